"""Export a run as one file that needs no blemish: python tools/export.py run=results/runs/… format=onnx|torch_export|openvino"""

from blemish.cli import tool

if __name__ == "__main__":
    tool("export")
