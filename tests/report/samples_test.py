import tokenizers
from tokenizers import decoders, models, normalizers, trainers

from efflm.report import samples
from efflm.text import tokenizer


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
