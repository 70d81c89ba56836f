"""Fit, test and record one detector: python tools/train.py model=padim data=mvtec data.category=screw; with -m a sweep over several."""

from blemish.cli import tool

if __name__ == "__main__":
    tool("train")
