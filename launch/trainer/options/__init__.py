"""The options of a training run: flags, groups of them, their checks, and what a run keeps of them.

flags       a flag as a field; the command line's parser
method      the groups of optimizer and subspace
groups      the other groups: model, data, run, devices
checks      what is wrong with a value or a combination; values that follow from others
record      `options.json`, and whether a run goes on as what it was
options     `Options`, which brings all of it together
"""

from launch.trainer.options.flags import count as count
from launch.trainer.options.method import PER_LAYER as PER_LAYER
from launch.trainer.options.options import Options as Options
from launch.trainer.options.record import FIXED as FIXED
