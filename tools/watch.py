"""Score images as they arrive: python tools/watch.py model=RUN|EXPORT input=FOLDER|CAMERA|RTSP|VIDEO output=FOLDER"""

from blemish.cli import tool

if __name__ == "__main__":
    tool("watch")
