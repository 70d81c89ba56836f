"""Load a run and test it again: python tools/test.py run=results/runs/…"""

from blemish.cli import tool

if __name__ == "__main__":
    tool("test")
