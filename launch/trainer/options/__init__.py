"""The options of a training run: flags, option groups, their checks, and the stored record.

flags       a flag as a field; the command line's parser
method      the groups of optimizer and subspace
groups      the other groups: model, data, run, devices
checks      invalid values and combinations; values derived from others
record      `options.json`, and whether a run resumes unchanged
options     `Options`, which combines all of it
"""

from launch.trainer.options.flags import count as count
from launch.trainer.options.method import PER_LAYER as PER_LAYER
from launch.trainer.options.options import Options as Options
from launch.trainer.options.record import FIXED as FIXED
