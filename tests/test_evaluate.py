import jax
import numpy as np
import oracles
import pytest

from bvit_jax import components, data, evaluate, sharding, train_step, vit
from tests.conftest import make_model


def test_logits_are_scored_by_hand():
    # softmax of (0, ln 3) is (1/4, 3/4).
    logits = np.log(np.array([[1, 3], [3, 1], [3, 1], [1, 3]], np.float32))
    found = evaluate.from_logits(logits, np.array([1, 1, 0, 0]))
    assert (found.accuracy, found.count) == (0.5, 4)
    assert found.nll == pytest.approx(-(2 * np.log(3 / 4) + 2 * np.log(1 / 4)) / 4)
    assert found.to_dict().keys() == {"accuracy", "nll", "count"}


def test_logits_are_scored_as_the_oracle_does():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(50, 7)).astype(np.float32), rng.integers(0, 7, 50)
    found = evaluate.from_logits(logits, labels)
    assert found.nll == pytest.approx(oracles.cross_entropy(logits.astype(np.float64), labels, 0).mean(), rel=1e-12)


def test_large_logits_do_not_overflow():
    found = evaluate.from_logits(np.array([[1e4, 0], [-3e38, 3e38]], np.float32), np.array([0, 1]))
    assert (found.accuracy, found.nll) == (1, 0)
    assert evaluate.from_logits(np.array([[1e4, 0]], np.float32), np.array([1])).nll == 1e4


def test_without_rotations_all_experts_are_the_prototype(key):
    config = make_model(form="tied")
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(key, leaf.shape), vit.init_params(config, key))
    still = evaluate.without_rotations(params)
    changed = {
        components.path_of(path).split("/")[-1]
        for (path, before), after in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(still), strict=True
        )
        if not np.array_equal(before, after)
    }
    assert changed == {"theta_angles", "phi_angles"}
    ffn = still["segment_0"]["block_0"]["ffn"]
    assert not ffn["theta_angles"].any()
    images = jax.random.uniform(key, (3, 8, 8, 1))
    apply = jax.jit(vit.apply, static_argnums=0)
    logits, _ = apply(config, still, images)
    # Whichever experts a token is sent to, it meets the same matrix.
    still["segment_0"]["block_0"]["ffn"]["router"]["kernel"] = -ffn["router"]["kernel"]
    np.testing.assert_allclose(apply(config, still, images)[0], logits, atol=1e-4)
    assert np.abs(apply(config, params, images)[0] - logits).max() > 1e-3


@pytest.mark.parametrize("kind", ["row", "tensor"])
def test_statistics_of_ternary_experts_by_hand(kind, key):
    config = make_model(family="ternary", ternary_scale=kind)
    params = vit.init_params(config, key)
    ffn = params["segment_0"]["block_0"]["ffn"]
    # All weights 1, but of one of 4 experts 3.
    kernel = np.ones(ffn["up_kernel"].shape, np.float32)
    kernel[:, 0] = 3
    ffn["up_kernel"] = kernel
    ffn["down_kernel"] = np.zeros_like(ffn["down_kernel"])
    found = evaluate.ternary_statistics(params, config)
    path = "segment_0/block_0/ffn"
    assert found.keys() == {f"{path}/up_kernel", f"{path}/down_kernel"}
    assert found[f"{path}/up_kernel"] == pytest.approx({"zeros": 0, "scale": (3 + 1 + 1 + 1) / 4})
    assert found[f"{path}/down_kernel"] == pytest.approx({"zeros": 1, "scale": 1e-5})
    kernel[1, 1, :8] = 0  # of 64 inputs, in one of 2 layers, one of 4 experts: the scale there is 7 / 8
    found = evaluate.ternary_statistics(params, config)
    assert found[f"{path}/up_kernel"] == pytest.approx({"zeros": 1 / 64, "scale": (12 - 1 / 8) / 8})
    for other in (make_model(family="standard"), make_model(family="ternary", ternary_scale="none")):
        assert evaluate.ternary_statistics(params, other) == {}


def test_between_is_called_after_each_batch_and_what_it_raises_ends_the_evaluation(monkeypatch):
    # A model that says class 1 of every image; the step that is compiled otherwise is not what is tested.
    def step(params, images, labels, weights):
        calls.append("batch")
        count = weights.sum()
        return train_step.EvalSums(count, ((labels == 1) * weights).sum(), 2 * count, None, None)

    class ToldToStop(Exception):
        pass

    def stop() -> None:
        calls.append("between")
        if calls.count("between") == 2:
            raise ToldToStop

    monkeypatch.setattr(train_step, "make_eval_step", lambda config, placement: step)
    split = data.Split(np.zeros((5, 8, 8, 1), np.float32), np.array([1, 1, 0, 1, 1], np.int32))
    config = make_model()
    placement = sharding.place(config, 2)
    calls: list[str] = []
    found = evaluate.evaluate({}, config, split, 2, placement, lambda: calls.append("between"))
    assert calls == ["batch", "between"] * 3
    assert (found.accuracy, found.nll, found.count) == (0.8, 2.0, 5)
    assert evaluate.evaluate({}, config, split, 2, placement) == found
    calls.clear()
    with pytest.raises(ToldToStop):
        evaluate.evaluate({}, config, split, 2, placement, stop)
    assert calls == ["batch", "between"] * 2
