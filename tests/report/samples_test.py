import types

import tokenizers
from tokenizers import decoders, models, normalizers, trainers

from efflm.evaluate import throughput
from efflm.evaluate.throughput import Protocol
from efflm.infer import generate
from efflm.report import samples
from efflm.text import tokenizer
from tests import tiny


def test_a_sample_keeps_the_space_it_begins_with(tmp_path):
    """A tokenizer that puts a space before each text leaves it out of what it decodes, but in a sample it is one."""
    core = tokenizers.Tokenizer(models.BPE())
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    core.train_from_iterator(["the river runs"] * 3, trainers.BpeTrainer(special_tokens=special, show_progress=False))
    core.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    found = tokenizer.load(tmp_path)
    ids = found.encode("river runs")
    assert found.decode(ids) == "river runs"
    assert samples.text(ids, found) == " river runs"


def test_the_programs_of_the_speed_rounds_write_the_same_and_nothing_is_compiled():
    model, protocol = tiny.model(), Protocol(prompt=8, start=8, new=6, repeats=1)
    throughput.rates({"": model}, protocol)
    compiled = [fn._cache_size() for fn in (generate.prefill, generate.start, generate.decode)]
    found = samples.write(model, types.SimpleNamespace(stops=()), [5, 6, 7], 6, protocol)
    assert [fn._cache_size() for fn in (generate.prefill, generate.start, generate.decode)] == compiled
    assert found == samples.write(model, types.SimpleNamespace(stops=()), [5, 6, 7], 6) != []
    ended = samples.write(model, types.SimpleNamespace(stops=found[2:3]), [5, 6, 7], 6, protocol)
    assert ended == found[: found.index(found[2])]
