"""Check a data set, or make one to choose settings on: python tools/data.py check|synthesize data=mvtec data.root=<folder> [output=…].

check: prints what is there and what is broken, and writes the split as a CSV. synthesize: makes a folder of the training images, a share
of them with drawn defects, for data=folder data.normal_test=normal_test data.abnormal=[defects] data.masks=masks.
"""

from blemish.cli import tool

if __name__ == "__main__":
    tool("data")
