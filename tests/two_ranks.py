"""Started by test_stages.py under torchrun: the scripts one after the other. Its argument is JSON, [[script, flags], ...]."""

import json
import sys
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

import helpers  # noqa: E402

dist.init_process_group("gloo")
dist.destroy_process_group, leave = dist.barrier, dist.destroy_process_group  # one group for all, a start costs seconds
for script, words in json.loads(sys.argv[1]):
    helpers.call(script, *words)
leave()
