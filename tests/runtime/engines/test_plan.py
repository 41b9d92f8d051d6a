"""What an engine is asked to be: shapes of both profiles, fingerprints and networks that differ, by name."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from edgestill.runtime.engines.plan import (
    EnginePlan,
    check_network,
    fingerprint_from,
    fingerprint_of,
    plan_of,
    refuse_card,
)
from edgestill.runtime.errors import BadInput, BundleError
from edgestill.runtime.manifest import FileEntry, Graph, Manifest, ModelFacts, Precision, TensorSpec

FACTS = ModelFacts("llama", 0, 1, 4, 2, 16, 64, 320, 100, 0, (0,))
CACHE = ("batch_size", 2, 100, 16)
GRAPH = Graph(
    "model.onnx",
    (
        TensorSpec("input_ids", "int64", ("batch_size", "new")),
        TensorSpec("logit_positions", "int64", ("batch_size", "kept")),
        TensorSpec("key_positions", "int64", ("attended",)),
        TensorSpec("past_key_values.0.key", "float16", CACHE),
        TensorSpec("past_key_values.0.value", "float16", CACHE),
    ),
    (TensorSpec("logits", "float32", ("batch_size", "kept", 320)),),
    "fixed",
)


def manifest(**changes: Any) -> Manifest:
    profile = {
        "device": {"engine": "tensorrt-rtx", "compute_capability": "8.9"},
        "workload": {"prompt_tokens": 40, "new_tokens": 20, "batch_size": 3},
    }
    made = Manifest("tiny", {"model.onnx": FileEntry("0" * 64, 5)}, FACTS, GRAPH, Precision("float16"), profile, {})
    return dataclasses.replace(made, **changes)


def test_shapes_by_hand() -> None:
    plan = plan_of(manifest())
    assert (plan.capacity, plan.max_batch, plan.prefill_tokens) == (
        100,
        3,
        100,
    )  # 128 a pass, but no more than the cache
    assert plan.shapes("input_ids", ("batch_size", "new")) == (((1, 1), (3, 40), (3, 100)), ((1, 1), (3, 1), (3, 1)))
    assert plan.shapes("logit_positions", ("batch_size", "kept"))[1] == ((1, 1), (3, 1), (3, 1))
    assert plan.shapes("key_positions", ("attended",)) == (((1,), (60,), (100,)),) * 2
    assert plan.shapes("past", CACHE)[0] == ((1, 2, 100, 16), (3, 2, 100, 16), (3, 2, 100, 16))
    wide = dataclasses.replace(FACTS, vocab_size=1_000_000)  # 64 MiB hold 16 rows of 4 MB: 5 for each of three
    assert plan_of(manifest(model=wide)).shapes("logit_positions", ("batch_size", "kept"))[0][2] == (3, 5)
    with pytest.raises(BundleError, match=r"unknown size 'odd'"):
        plan.shapes("x", ("odd",))


def test_a_bundle_without_a_cache_of_fixed_length_has_no_engine() -> None:
    with pytest.raises(BundleError, match=r"its graph has a growing cache, no engine can be built of it"):
        plan_of(manifest(graph=dataclasses.replace(GRAPH, cache="growing")))


CHANGES: dict[str, dict[str, Any]] = {
    "flavour": {"profile": {**manifest().profile, "device": {"engine": "tensorrt"}}},
    "precision": {"precision": Precision("int4")},
    "graph_sha256": {"files": {"model.onnx": FileEntry("1" * 64, 5)}},
    "best_prompt": {
        "profile": {**manifest().profile, "workload": {"prompt_tokens": 50, "new_tokens": 20, "batch_size": 3}}
    },
    "max_batch": {
        "profile": {**manifest().profile, "workload": {"prompt_tokens": 40, "new_tokens": 20, "batch_size": 4}}
    },
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_bundle_is_another_engine_and_says_why(name: str) -> None:
    ours = fingerprint_of(plan_of(manifest()), "1.7", "8.9", "13.0")
    theirs = fingerprint_of(plan_of(manifest(**CHANGES[name])), "1.7", "8.9", "13.0")
    assert ours.digest != theirs.digest
    assert any(line.startswith(f"{name}: ") for line in ours.differences(theirs))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"version": "1.6"}, "version: 1.6, here 1.7"),
        ({"compute_capability": "8.6"}, "compute_capability: 8.6, here 8.9"),
        ({"driver": "12.9"}, "driver: 12.9, here 13.0"),
        ({"system": "windows amd64"}, "system: windows amd64, here "),
    ],
)
def test_another_machine_is_another_engine(change: dict[str, str], line: str) -> None:
    ours = fingerprint_of(plan_of(manifest()), "1.7", "8.9", "13.0")
    theirs = dataclasses.replace(ours, **change)
    assert ours.digest != theirs.digest
    (found,) = ours.differences(theirs)
    assert found.startswith(line)
    assert fingerprint_from(dataclasses.asdict(theirs)) == theirs


def test_a_card_that_cannot_run_it_is_refused() -> None:
    plan = dataclasses.replace(plan_of(manifest()), precision="fp8")
    refuse_card(plan, "8.9", None)
    with pytest.raises(
        BadInput, match=r"'fp8' is beyond NVIDIA A10 of compute capability 8.6 in tensorrt-rtx; use int4"
    ):
        refuse_card(plan, "8.6", "NVIDIA A10")


def network(graph: Graph, **changes: Any) -> Any:
    """What a parsed network answers, with `changes` of {name: (dtype, shape)}."""

    def tensors(specs: tuple[TensorSpec, ...]) -> list[Any]:
        found = []
        for spec in specs:
            dtype, shape = changes.get(
                spec.name, (spec.dtype, tuple(n if isinstance(n, int) else -1 for n in spec.shape))
            )
            if dtype is not None:
                found.append(SimpleNamespace(name=spec.name, dtype=dtype, shape=shape))
        return found

    ins, outs = tensors(graph.inputs), tensors(graph.outputs)
    return SimpleNamespace(
        num_inputs=len(ins), get_input=ins.__getitem__, num_outputs=len(outs), get_output=outs.__getitem__
    )


def test_the_network_is_compared_with_the_manifest() -> None:
    check_network(network(GRAPH), GRAPH, FACTS, str)
    for change, complaint in (
        ({"past_key_values.0.key": (None, ())}, r"differ in input past_key_values\.0\.key"),
        ({"past_key_values.0.key": ("float32", (-1, 2, 100, 16))}, "is float32"),
        ({"past_key_values.0.key": ("float16", (-1, 2, 64, 16))}, r"\(-1, 2, 64, 16\) in the network"),
        ({"input_ids": ("int32", (-1, -1))}, "input_ids is int32"),
        ({"input_ids": ("int64", (1, -1))}, "input_ids is int64"),  # a batch that became fixed
        ({"logits": ("float16", (-1, -1, 320))}, "logits is float16"),
    ):
        with pytest.raises(BundleError, match=complaint):
            check_network(network(GRAPH, **change), GRAPH, FACTS, str)
    with pytest.raises(BadInput, match=r"2 cache inputs for 3 layers"):
        check_network(network(GRAPH), GRAPH, dataclasses.replace(FACTS, n_layers=3), str)


def test_plans_are_plain_data() -> None:
    plan = plan_of(manifest())
    assert EnginePlan(**dataclasses.asdict(plan)) == plan
