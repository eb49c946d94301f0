"""Devices that break are worth another start, but not for ever."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from efflm.config.train import TrainConfig
from efflm.formats import arrays
from efflm.parallel import meshes, processes
from efflm.train import trainer
from efflm.train.checkpointing import Checkpointing

BROKEN = "INTERNAL: CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered"


def life(folder, fault_at=None, steps=6, error=BROKEN, programs={}):  # noqa: B006  (compiled once)
    """The exit code of a run with a checkpoint every second step, whose device breaks before a step."""

    def batches(step):
        if step == fault_at:
            raise jax.errors.JaxRuntimeError(error)
        return {"inputs": np.ones((8, 4), np.float32)}

    try:
        train, start = TrainConfig(steps=steps), lambda: {"embedding": jnp.ones((8, 4))}
        task = trainer.Task(train=train, loss_fn=loss, start=start, batches=batches, rule=OPTIMIZER)
        kept = Checkpointing(directory=folder, every=2)
        trainer.fit(task, mesh=meshes.make_mesh(), checkpointing=kept, programs=programs)
    except Exception as failed:
        return processes.exit_code(failed), failed
    return 0, None


OPTIMIZER = optax.sgd(0.1)


def loss(tree, frozen, batch, rng):
    return jnp.mean((tree["embedding"] - batch["inputs"]) ** 2), {}


def test_a_fault_is_worth_three_lives_from_each_checkpoint(tmp_path):
    codes = [life(tmp_path, fault_at=at)[0] for at in (3, 3, 5, 5)]
    assert codes == [processes.RETRY] * 4  # the checkpoint of step 2, then that of step 4
    code, failed = life(tmp_path, fault_at=5)
    assert code == processes.BUG
    assert "a device failed 3 times without a checkpoint in between" in str(failed)
    assert "illegal memory access" in str(failed)
    assert str(tmp_path / "faults-0.json") in str(failed)
    (tmp_path / "faults-0.json").unlink()
    assert life(tmp_path, fault_at=5)[0] == processes.RETRY
    assert life(tmp_path) == (0, None)


def test_a_fault_before_the_first_checkpoint_counts_and_a_damaged_count_is_begun_anew(tmp_path):
    assert [life(tmp_path, fault_at=0)[0] for _ in range(2)] == [processes.RETRY] * 2
    (tmp_path / "faults-0.json").write_text("[")
    assert [life(tmp_path, fault_at=0)[0] for _ in range(3)] == [processes.RETRY, processes.RETRY, processes.BUG]


def test_lost_machines_are_not_counted(tmp_path):
    lost = "UNAVAILABLE: Task 1 heartbeat timeout"
    assert [life(tmp_path, fault_at=0, error=lost)[0] for _ in range(4)] == [processes.RETRY] * 4
    assert not (tmp_path / "faults-0.json").exists()


def test_a_fault_in_a_save_counts(tmp_path, monkeypatch):
    def broken():
        raise jax.errors.JaxRuntimeError(BROKEN)

    monkeypatch.setattr(arrays, "checkpointer", broken)
    assert [life(tmp_path)[0] for _ in range(3)] == [processes.RETRY, processes.RETRY, processes.BUG]
