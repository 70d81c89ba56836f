"""Score images with a run: python tools/predict.py run=results/runs/… input=FILE|FOLDER output=FOLDER"""

from blemish.cli import tool

if __name__ == "__main__":
    tool("predict")
