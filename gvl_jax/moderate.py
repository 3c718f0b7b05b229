"""The guard as a function: a request, a response and pictures in, a judgement out; and the same for a JSONL file.

Whatever goes wrong with an input or with the model's answer is a judgement too, one that blocks: it fails closed.
"""

import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import batched_rows
from pathlib import Path
from typing import NamedTuple
