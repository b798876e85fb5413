"""Data Remixing in three steps on tensors: difficulty (N, M) -> decouple (N, M) -> reassemble (a plan of batches).

Xiaoyu Ma, Hao Chen, Yongjian Deng: Improving Multimodal Learning Balance and Sufficiency through Data Remixing,
ICML 2025, arXiv 2506.11550. Pure functions for any number of modalities: no files, no flags, no model class.
"""

from remix.decouple import KEEP, decouple
from remix.difficulty import SCORES, difficulty, kl_from_uniform
from remix.loader import RemixBatchSampler, plan
from remix.reassemble import ABLATIONS, ORDERS, Batch, batches_of, reassemble

__version__ = "0.2.0"
__all__ = ["ABLATIONS", "KEEP", "ORDERS", "SCORES", "Batch", "RemixBatchSampler", "batches_of", "decouple",
           "difficulty", "kl_from_uniform", "plan", "reassemble"]  # fmt: skip
