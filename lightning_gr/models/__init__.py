"""LightningModules of generative recommenders and their networks; none knows anything of distribution."""

from lightning_gr.models.dlrm import DLRM
from lightning_gr.models.meta_ranking import MetaRankingModule
from lightning_gr.models.mtgr import MTGR
from lightning_gr.models.parameter_groups import ParameterGroup, build_optimizer
from lightning_gr.models.ranking import RankingModule, RankingNetwork
from lightning_gr.models.retrieval import RetrievalModule
from lightning_gr.models.warmup import WarmupSchedule

__all__ = [
    "DLRM",
    "MTGR",
    "MetaRankingModule",
    "ParameterGroup",
    "RankingModule",
    "RankingNetwork",
    "RetrievalModule",
    "WarmupSchedule",
    "build_optimizer",
]
