"""Time a run by stage and engine: python tools/bench.py run=results/runs/… [batch=8] [threads=2]"""

from blemish.cli import tool

if __name__ == "__main__":
    tool("bench")
