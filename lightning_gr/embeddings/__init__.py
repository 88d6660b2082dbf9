"""Embedding tables, their first values, and scores against rows that are spread over processes."""

from lightning_gr.embeddings.candidate_block import (
    CandidateBlock,
    all_processes_of,
    corpus_share,
    process_group_of,
)
from lightning_gr.embeddings.static_tables import (
    deferred_tables,
    embedding_collection,
    initialise_tables,
    is_static_collection,
    table_values,
)

__all__ = [
    "CandidateBlock",
    "all_processes_of",
    "corpus_share",
    "deferred_tables",
    "embedding_collection",
    "initialise_tables",
    "is_static_collection",
    "process_group_of",
    "table_values",
]
