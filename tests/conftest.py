"""What tests of several rooms share."""

from pathlib import Path

import numpy as np
import pytest

from megamf.data.indexed import IndexedWriter, Metadata


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Documents of 1 to 60 tokens ending in 0, so that rows hold several and some are cut; learnable by counting."""
    prefix = tmp_path_factory.mktemp("corpus") / "text"
    rng = np.random.default_rng(0)
    with IndexedWriter(prefix, vocab_size=61) as writer:
        for _ in range(400):
            body = (np.cumsum(rng.integers(1, 4, rng.integers(1, 60))) % 60 + 1).tolist()
            writer.add_document([*body, 0])
        facts = {"vocab_size": 61, "eod_id": 0, "appended_eod": True, "documents": 400, "bytes": 1}
        writer.commit(Metadata(tokenizer="numbers", tokenizer_sha256="0" * 64, tokens=writer.num_tokens, **facts))
    return prefix
