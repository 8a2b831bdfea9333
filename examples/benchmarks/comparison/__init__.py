"""The parts of `quality.py`: tasks, arms, jobs, plan, training and tables."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the examples' data.py
