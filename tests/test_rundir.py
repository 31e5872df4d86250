import pytest
import yaml

from megamf.config import ConfigError, load_config
from megamf.rundir import check_writable, claim


def config(directory, *overrides):
    return load_config(overrides=[f"run.dir={directory}", *overrides])


def test_first_claim_writes_a_configuration_that_reads_back(tmp_path):
    first = config(tmp_path / "run", "optim.lr=0.002")
    claim(first)
    assert load_config(tmp_path / "run" / "config.yaml") == first


def test_without_write_nothing_appears(tmp_path):
    claim(config(tmp_path / "run"), write=False)
    assert not (tmp_path / "run").exists()


def test_another_configuration_is_refused_with_both_values_and_kept(tmp_path):
    claim(config(tmp_path))
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"model\.n_layer: 24 there, 12 now"):
        claim(config(tmp_path, "model.n_layer=12"))
    assert (tmp_path / "config.yaml").read_text() == before


def test_layout_and_logging_may_change(tmp_path):
    claim(config(tmp_path))
    claim(config(tmp_path, "parallel.ep=4", "deepspeed=zero2", "train.micro_batch=4", "logging.every=5"))
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["parallel"]["ep"] == 4


def test_unwritable_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run\.dir=.*cannot be written"):
        check_writable(tmp_path / "file" / "run")


def test_a_run_of_a_version_without_a_setting_goes_on_while_it_is_at_its_default(tmp_path):
    claim(config(tmp_path, "optim.beta1=0.8"))
    tree = yaml.safe_load((tmp_path / "config.yaml").read_text())
    del tree["tune"], tree["optim"]["clip"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=r"optim\.clip: 1\.0 there, 2\.0 now"):
        claim(config(tmp_path, "optim.beta1=0.8", "optim.clip=2"))
    claim(config(tmp_path, "optim.beta1=0.8"))


def test_a_dense_run_of_an_earlier_version_goes_on(tmp_path):
    dense = ("model.kind=dense", "model.n_embd=64", "model.n_head=2", "model.att_hidden=64", "losses.balance=none")
    claim(config(tmp_path, *dense))
    tree = yaml.safe_load((tmp_path / "config.yaml").read_text())
    del tree["tune"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    claim(config(tmp_path, *dense))
