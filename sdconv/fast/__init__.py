"""The fast backend: faster implementations of what :mod:`sdconv.models` computes.

Importing it registers them with :mod:`sdconv.backends`. Read :mod:`sdconv.fast.blocks` first.
"""

from sdconv.fast import blocks as blocks
from sdconv.fast import tiny as tiny
from sdconv.fast import transformers as transformers
from sdconv.fast.cuda.weights import arrange_weights as arrange_weights
