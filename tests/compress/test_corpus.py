"""Splitting, packing, masks, blocks and the order of training, on a real byte-level tokenizer."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import write_text, write_tokenizer

from edgestill.compress.corpus import Corpus, build_corpus, open_corpus, source_hashes, training_order
from edgestill.compress.encoding import cut_texts
from edgestill.compress.packing import window_blocks
from edgestill.compress.sources import Document
from edgestill.profiles.schema import DataSpec
from edgestill.runtime.errors import BadInput
from edgestill.runtime.progress import QuietProgress

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}<|endoftext|>{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
Build = Callable[..., Corpus]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    write_tokenizer(tmp_path / "tokenizer", template=CHAT)

    def make(out: str = "out", seed: int = 0, tokenizer: str = "tokenizer", **words: Any) -> Corpus:
        data = DataSpec.model_validate({"sequence_length": 32, **words})
        folder = tmp_path / out
        build_corpus(data, lambda p: tmp_path / p, tmp_path / tokenizer, folder, seed=seed, progress=QuietProgress())
        return open_corpus(folder)

    return make


def ids_of(tmp_path: Path, text: str) -> list[int]:
    from tokenizers import Tokenizer

    encoded: list[int] = Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json")).encode(text).ids
    return encoded


def decode(tmp_path: Path, ids: Any) -> str:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
    text: str = tokenizer.decode(np.asarray(ids).reshape(-1).tolist(), skip_special_tokens=False)
    return text


def test_one_document_is_cut_at_paragraphs_and_nothing_is_lost_but_the_ends(tmp_path: Path, build: Build) -> None:
    text = write_text(tmp_path / "a.txt", words=3000).read_text()
    corpus = build(sources=[{"path": "a.txt"}], validation={"fraction": 0.1}, held_out={"fraction": 0.2})
    whole = [*ids_of(tmp_path, text), 0]
    cuts = [0]
    for part, share in ((corpus.training, 0.7), (corpus.validation, 0.1), (corpus.held_out, 0.2)):
        tokens = part.token_ids.reshape(-1).tolist()
        start = next(i for i in range(cuts[-1], cuts[-1] + 32) if whole[i : i + 64] == tokens[:64])
        assert whole[start : start + len(tokens)] == tokens
        assert abs(len(tokens) / len(whole) - share) < 0.03
        assert start == 0 or decode(tmp_path, whole[:start]).endswith("\n\n")
        assert not decode(tmp_path, tokens).startswith("\n")
        assert part.token_ids.dtype == np.uint16
        assert isinstance(part.token_ids, np.memmap)
        assert part.loss_mask is None
        cuts.append(start + len(tokens))
    assert len(whole) - cuts[-1] < 32
    assert corpus.sources[0]["tokens"] == len(whole)
    parts = (corpus.training, corpus.validation, corpus.held_out)
    assert corpus.dropped_tokens == len(whole) - sum(p.token_ids.size for p in parts)


def test_few_documents_are_cut_each_at_its_own_end_and_only_true_ends_end() -> None:
    texts = ["a" * 50 + "\n\n" + "b" * 18 + "\n\n" + "c" * 28, "d\n" * 10]
    pieces = cut_texts([Document(text) for text in texts], {"validation": 0.2, "held_out": 0.3})
    assert pieces == {
        "training": [Document(texts[0][:52], complete=False), Document("d\n" * 5, complete=False)],
        "validation": [Document(texts[0][52:72], complete=False), Document("d\n" * 2, complete=False)],
        "held_out": [Document("c" * 28), Document("d\n" * 3)],
    }
    for i, text in enumerate(texts):
        assert "".join(pieces[part][i].text for part in ("training", "validation", "held_out")) == text
    assert cut_texts([Document("unbroken")], {"held_out": 0.25}) == {
        "training": [Document("unbrok", complete=False)],
        "held_out": [Document("en")],
    }


def test_many_documents_stay_whole(tmp_path: Path, build: Build) -> None:
    rng = random.Random(0)
    documents = [f"{i} " + "".join(rng.choices("abcdefgh ", k=rng.randint(20, 120))).strip() for i in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    words = {"sources": [{"path": "a.jsonl"}], "validation": {"fraction": 0.2}, "held_out": {"fraction": 0.2}}
    corpus = build(**words)
    found = {}
    for name in ("training", "validation", "held_out"):
        pieces = decode(tmp_path, getattr(corpus, name).token_ids).split("<|endoftext|>")
        found[name] = [int(piece.split()[0]) for piece in pieces if piece in documents]
        assert all(piece in documents for piece in pieces[:-1])  # windows begin with the first document
    assert max(found["training"]) < min(found["validation"])
    assert max(found["validation"]) < min(found["held_out"])
    assert found["held_out"] == sorted(found["held_out"])
    assert found["training"] != sorted(found["training"])  # packed in a shuffled order
    assert corpus.sources[0]["documents"] == 60
    assert build("again", **words).sha256 == corpus.sha256
    assert build("other", seed=1, **words).sha256 != corpus.sha256


def test_only_the_response_and_its_end_are_labels(tmp_path: Path, build: Build) -> None:
    rng = random.Random(1)
    rows = [{"q": f"what is {i}?", "a": "".join(rng.choices("klmnop", k=rng.randint(1, 30)))} for i in range(80)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_text(tmp_path / "b.txt", words=600)
    source = {"path": "a.jsonl", "prompt_column": "q", "response_column": "a", "domain": "chat"}
    corpus = build(
        sources=[source, {"path": "b.txt", "domain": "prose"}], validation={"fraction": 0.2}, held_out={"fraction": 0.2}
    )
    held_out = corpus.held_out
    assert held_out.loss_mask is not None
    chat = held_out.domain == corpus.domains.index("chat")
    assert held_out.loss_mask[~chat].all()
    tokens, mask = held_out.token_ids[chat].reshape(-1), held_out.loss_mask[chat].reshape(-1)
    first = next(i for i, row in enumerate(rows) if decode(tmp_path, tokens).startswith(f"<user>{row['q']}\n"))
    expected = []
    for row in rows[first:]:
        prompt = ids_of(tmp_path, f"<user>{row['q']}\n<assistant>")
        answer = ids_of(tmp_path, row["a"] + "<|endoftext|>")
        expected += [*[(i, 0) for i in prompt], *[(i, 1) for i in answer], *[(i, 0) for i in ids_of(tmp_path, "\n")]]
    assert list(zip(tokens.tolist(), mask.tolist(), strict=True)) == expected[: len(tokens)]


def test_a_response_without_an_end_token_gets_one(tmp_path: Path, build: Build) -> None:
    turns = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
    template = turns + "{% if add_generation_prompt %}assistant:{% endif %}"
    write_tokenizer(tmp_path / "plain", template=template)
    rows = "".join(json.dumps({"q": f"question {i}", "a": f"answer {i}"}) + "\n" for i in range(60))
    (tmp_path / "a.jsonl").write_text(rows)
    words = {"sources": [{"path": "a.jsonl", "prompt_column": "q", "response_column": "a"}]}
    corpus = build(tokenizer="plain", validation={"fraction": 0.2}, held_out={"fraction": 0.3}, **words)
    assert corpus.held_out.loss_mask is not None
    labels = decode(tmp_path, corpus.held_out.token_ids[corpus.held_out.loss_mask == 1])
    assert labels.startswith("answer 42\n<|endoftext|>answer 43\n<|endoftext|>")


def test_templates_that_cannot_be_used(tmp_path: Path, build: Build) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"q": "x", "a": "he"}) + "\n")
    words = {"sources": [{"path": "a.jsonl", "prompt_column": "q", "response_column": "a"}]}
    cases = {
        None: "no chat template",
        "{% for m in messages %}{{ m.content }}t{% endfor %}": "do not begin the",  # "t" + "he" merge into one token
        "{{ raise_exception('roles must alternate') }}": "refuses it .roles must alternate",
    }
    for number, (template, message) in enumerate(cases.items()):
        write_tokenizer(tmp_path / f"t{number}", template=template)
        with pytest.raises(BadInput, match=f"a.jsonl, row 1: .*{message}"):
            build(tokenizer=f"t{number}", **words)


def test_blocks_by_hand() -> None:
    ends = np.array([40, 43, 57, 60])  # windows of 4: ten in one document, one of two, three in the next, one of two
    assert window_blocks(ends, 15, 4).tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 4, 4, 4, 5]
    assert window_blocks(np.array([2, 4, 6, 8]), 2, 4).tolist() == [0, 1]
    assert window_blocks(np.array([4, 8]), 2, 4).tolist() == [0, 1]
    assert window_blocks(np.array([3]), 0, 4).tolist() == []


def test_own_texts_for_validation_and_held_out(tmp_path: Path, build: Build) -> None:
    for seed, name in enumerate(("train", "more", "valid", "held")):
        write_text(tmp_path / f"{name}.txt", seed, words=500)
    corpus = build(
        sources=[{"path": "train.txt", "domain": "a"}, {"path": "more.txt", "domain": "b"}],
        validation=[{"path": "valid.txt", "domain": "b"}],
        held_out=[{"path": "held.txt", "domain": "c"}],
    )
    assert corpus.domains == ("a", "b", "c")
    assert [(s["name"], s["part"]) for s in corpus.sources] == [
        ("train.txt", "training"),
        ("more.txt", "training"),
        ("valid.txt", "validation"),
        ("held.txt", "held_out"),
    ]
    assert set(corpus.held_out.source) == {3}
    assert set(corpus.held_out.domain) == {2}
    text = decode(tmp_path, corpus.held_out.token_ids)
    assert (tmp_path / "held.txt").read_text().startswith(text[:2000])
    assert list(corpus.training.block) == sorted(corpus.training.block)


def write_domains(path: Path, counts: dict[str, int], seed: int = 0) -> None:
    """Rows of the domains in mixed order; every text consists of words that begin with its domain's name."""
    rng = random.Random(seed)
    rows = [domain for domain, count in counts.items() for _ in range(count)]
    rng.shuffle(rows)
    texts = (" ".join(f"{domain}{rng.randint(0, 9999)}" for _ in range(rng.randint(8, 20))) for domain in rows)
    lines = [json.dumps({"text": text, "of": domain}) for text, domain in zip(texts, rows, strict=True)]
    path.write_text("\n".join(lines))


def test_one_source_of_several_domains(tmp_path: Path, build: Build) -> None:
    write_domains(tmp_path / "a.jsonl", {"P": 300, "Q": 60, "R": 12})  # the last is cut within its documents
    write_text(tmp_path / "b.txt", words=800)
    parts = {"validation": {"fraction": 0.2}, "held_out": {"fraction": 0.25}}
    plain = {"path": "b.txt", "domain": "Q"}
    corpus = build(sources=[{"path": "a.jsonl", "domain_column": "of", "weight": 2}, plain], **parts)
    first = json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0])["of"]
    assert corpus.domains[0] == first
    assert set(corpus.domains) == {"P", "Q", "R"}
    ours, theirs = corpus.sources
    assert set(ours["domains"]) == {"P", "Q", "R"}
    assert sum(ours["domains"].values()) == ours["tokens"]
    assert theirs["domains"] == {"Q": theirs["tokens"]}
    assert ours["documents"] == 372
    for part in (corpus.training, corpus.validation, corpus.held_out):
        seen = set()
        for ids, domain, source in zip(part.token_ids, part.domain, part.source, strict=True):
            name = corpus.domains[domain]
            if source == 0:
                text = decode(tmp_path, ids).replace("<|endoftext|>", " ")
                assert set(text) <= {*f"{name}0123456789 "}, text  # no letter of another domain
                seen.add(name)
            else:
                assert name == "Q"
        assert seen == {"P", "Q", "R"}  # each domain has its share of every part
    for name in ("P", "Q"):
        windows = [
            int((p.domain[p.source == 0] == corpus.domains.index(name)).sum())
            for p in (corpus.training, corpus.held_out)
        ]
        assert windows[0] / sum(windows) == pytest.approx(0.55 / 0.8, abs=0.08)
    order = training_order(corpus, 32 * 300, seed=1)
    source, domain = np.asarray(corpus.training.source)[order], np.asarray(corpus.training.domain)[order]
    assert abs((source == 0).sum() - 200) <= 1
    of_p = (domain == corpus.domains.index("P"))[source == 0]
    assert 0 < of_p[:40].sum() < 40  # domains of one source are seen mixed, not one after the other
    again = build("again", sources=[{"path": "a.jsonl", "domain_column": "of", "weight": 2}, plain], **parts)
    other = build("other", sources=[{"path": "a.jsonl", "weight": 2}, plain], **parts)
    assert again.sha256 == corpus.sha256 != other.sha256
    assert other.domains == ("text", "Q")


def test_exchanges_and_own_parts_have_domains_too(tmp_path: Path, build: Build) -> None:
    for seed, name in enumerate(("train", "valid", "held")):
        rng = random.Random(seed)
        rows = [{"q": f"{i}?", "a": str(rng.random()), "of": "even" if i % 2 == 0 else "odd"} for i in range(120)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"prompt_column": "q", "response_column": "a", "domain_column": "of"}
    words = {p: [{"path": f"{n}.jsonl", **columns}] for p, n in (("validation", "valid"), ("held_out", "held"))}
    corpus = build(sources=[{"path": "train.jsonl", **columns}], **words)
    assert corpus.domains == ("even", "odd")
    for part, source in ((corpus.training, 0), (corpus.validation, 1), (corpus.held_out, 2)):
        assert set(part.source) == {source}
        assert part.loss_mask is not None
        for domain in (0, 1):
            text = decode(tmp_path, part.token_ids[part.domain == domain])
            numbers = [int(piece.split("?")[0]) for piece in text.split("<user>")[1:-1]]
            assert len(numbers) > 20
            assert {n % 2 for n in numbers} == {domain}


def test_a_domain_too_small_for_a_window_is_refused(tmp_path: Path, build: Build) -> None:
    write_domains(tmp_path / "a.jsonl", {"P": 300, "Q": 1})
    message = (
        r"'a.jsonl' leaves \d+ tokens of domain 'Q' for training, fewer than data.sequence_length 256; .*the domain"
    )
    with pytest.raises(BadInput, match=message):
        build(sources=[{"path": "a.jsonl", "domain_column": "of"}], sequence_length=256)


def test_too_little_text_and_overlap_are_refused(tmp_path: Path, build: Build) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("a few words")
    write_text(tmp_path / "a.txt", words=800)
    for words, message in (
        ({"sources": [{"path": "empty.txt"}]}, "'empty.txt' has no text"),
        ({"sources": [{"path": "short.txt"}]}, "'short.txt' leaves 1?[0-9] tokens for training"),
        ({"sources": [{"path": "a.txt"}, {"path": "short.txt"}]}, "'short.txt' leaves"),
        ({"sources": [{"path": "a.txt"}], "held_out": {"fraction": 0.001}}, r"data.held_out: .* window .* 32"),
        ({"sources": [{"path": "a.txt"}], "held_out": [{"path": "a.txt"}]}, "99.. % of the held-out text occurs"),
    ):
        with pytest.raises(BadInput, match=message):
            build(**words)
        with pytest.raises(BadInput, match=r"no readable corpus.json"):
            open_corpus(tmp_path / "out")


def test_damage_is_noticed_and_nothing_else_is_left_in_the_folder(tmp_path: Path, build: Build) -> None:
    write_text(tmp_path / "a.txt", words=1500)
    build(sources=[{"path": "a.txt"}])
    names = {path.name for path in (tmp_path / "out").iterdir()}
    arrays = ("token_ids", "domain", "block", "source")
    assert names == {"corpus.json", *(f"{p}.{a}.npy" for p in ("training", "validation", "held_out") for a in arrays)}
    file = tmp_path / "out" / "training.token_ids.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-2])
    with pytest.raises(BadInput, match=r"training.token_ids.npy: .* declares"):
        open_corpus(tmp_path / "out")
    file.write_bytes(whole)
    manifest = tmp_path / "out" / "corpus.json"
    manifest.write_text(manifest.read_text().replace('"sequence_length": 32', '"sequence_length": 64'))
    with pytest.raises(BadInput, match="was changed"):
        open_corpus(tmp_path / "out")


def test_order_of_training(tmp_path: Path, build: Build) -> None:
    write_text(tmp_path / "a.txt", 1, words=2000)
    write_text(tmp_path / "b.txt", 2, words=500)
    corpus = build(sources=[{"path": "a.txt", "weight": 1}, {"path": "b.txt", "weight": 3}])
    source = np.asarray(corpus.training.source)
    n_b = int((source == 1).sum())
    long = training_order(corpus, 32 * 5 * n_b - 31, seed=3)
    assert len(long) == 5 * n_b
    assert np.array_equal(training_order(corpus, 32 * 57, seed=3), long[:57])
    assert not np.array_equal(training_order(corpus, 32 * 57, seed=4), long[:57])
    for n in (4, 40, len(long)):
        assert abs((source[long[:n]] == 1).sum() - 0.75 * n) <= 1
    of_b = long[source[long] == 1]
    for epoch in range(len(of_b) // n_b):  # every window once per epoch
        assert np.array_equal(np.sort(of_b[epoch * n_b : (epoch + 1) * n_b]), np.flatnonzero(source == 1))
    assert not np.array_equal(of_b[:n_b], of_b[n_b : 2 * n_b])


def test_hashes_of_sources_follow_the_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "v.txt").write_text("two")
    data = DataSpec.model_validate({"sources": [{"path": "a.txt"}], "validation": [{"path": "v.txt"}]})
    before = source_hashes(data, lambda p: tmp_path / p)
    assert list(before) == ["a.txt", "v.txt"]
    (tmp_path / "v.txt").write_text("three")
    after = source_hashes(data, lambda p: tmp_path / p)
    assert (after["a.txt"] == before["a.txt"], after["v.txt"] == before["v.txt"]) == (True, False)
