"""The config loader: what it accepts, and what it says when it does not."""

import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import yaml

from shodh.config import ConfigError, dump_config, load_config, parse_config


@dataclass(frozen=True, kw_only=True)
class Inner:
    learning_rate: float = 0.1
    shape: tuple[int, int] = (1, 2)

    def __post_init__(self):
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate={self.learning_rate}: must be positive. Raise it.")


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    inner: Inner = field(default_factory=Inner)
    parts: tuple[Inner, ...] = ()


@pytest.fixture
def write(tmp_path):
    def _write(text):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return _write


def test_dump_of_a_config_loads_to_the_same_config(write):
    config = load_config(Outer, write("name: a\nparts: [{shape: [3, 4]}]"), ["inner.learning_rate=0.5"])
    assert config.parts[0].shape == (3, 4) and config.inner.learning_rate == 0.5
    assert load_config(Outer, write(dump_config(config))) == config


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        (
            "name: a\ninner: {learning_rat: 1}",
            [],
            "inner.learning_rat=1: no such key.*Did you mean inner.learning_rate",
        ),
        ("name: a\nparts: [{shap: 1}]", [], "parts.0.shap=1: no such key.*Did you mean parts.0.shape"),
        ("inner: {}", [], "name: missing"),
        ("name: a\ninner: {learning_rate: fast}", [], "inner.learning_rate='fast'"),
        ("name: a", ["inner.learning_rate=-1"], "learning_rate=-1.0: must be positive"),
        ("name: a", ["inner.learning_rate"], "not key=value"),
        ("name: a", ["name.x=1"], "name is a value, not a section"),
        ("name: [", [], "not valid YAML"),
        ("- 1", [], "holds a list"),
    ],
)
def test_bad_config_is_refused_in_one_line_that_names_the_key(write, text, overrides, said):
    with pytest.raises(ConfigError, match=said) as caught:
        load_config(Outer, write(text), overrides)
    assert "\n" not in str(caught.value)


def test_missing_file_names_those_beside_it(write):
    path = write("name: a")
    with pytest.raises(ConfigError, match="no such file. There are: .*config.yaml"):
        load_config(Outer, path.with_name("confg.yaml"))


def test_loader_imports_neither_torch_nor_deepspeed():
    code = "import sys, shodh.config, shodh.command_line; print({'torch', 'deepspeed'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_every_yaml_in_configs_loads(request):
    import settings
    from generate_data import GenerateConfig
    from reproduction import Reproduction

    from data.simulate.openfwi_files import GathersConfig

    configs = settings.CONFIGS | {"generate_data": GenerateConfig, "generate_gathers": GathersConfig}
    configs |= {"reproduce": Reproduction}
    paths = sorted((request.config.rootpath / "configs").glob("*/*.yaml"))
    assert paths
    for path in paths:
        load_config(configs[path.parent.name], path)
        assert yaml.safe_load(path.read_text())


def test_every_section_of_a_simulation_loads_as_its_simulators_config(request):
    from generate_data import SECTIONS, GenerateConfig, _load_simulator

    paths = sorted((request.config.rootpath / "configs" / "generate_data").glob("*.yaml"))
    assert any(path.stem == "base" for path in paths)
    for path in paths:
        config = load_config(GenerateConfig, path)
        num_sections = 0
        for section in SECTIONS:
            values = getattr(config, section)
            if values is not None:
                physics = parse_config(_load_simulator(section)[1], values, source=f"{path}, section {section}")
                assert physics.num_trajectories > config.num_test
                num_sections += 1
        assert num_sections


def test_base_corpus_holds_61000_tensors(request):
    values = yaml.safe_load((request.config.rootpath / "configs" / "generate_data" / "base.yaml").read_text())
    domains = [values[name] for name in ("acoustics", "open_channel", "porous_media")]
    assert sum(domain["num_trajectories"] * domain["num_snapshots"] for domain in domains) == 61_000
    assert all(domain["resolution"] == 128 for domain in domains)
