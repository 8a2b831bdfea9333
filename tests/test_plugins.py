"""What packages add is found by name, imported when it is asked for, and never takes a name that is taken."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from packages import install

from rankflow import plugins as module
from rankflow.errors import ConfigError
from rankflow.plugins import Plugins, import_plugin, name_of, snake_case

GROUP = "rankflow.formats"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> Plugins:
    monkeypatch.setattr(module, "_REGISTERED", {})

    def check(name: str, found: object) -> None:
        if not isinstance(found, int):
            raise ConfigError("not a number")

    return Plugins(GROUP, lambda: ["ours"], check)


def test_a_package_is_imported_when_what_it_added_is_asked_for(site, plugins):
    install(site, "polite_one", "seven = 7", {GROUP: {"seven": "polite_one:seven"}})
    assert plugins.names() == ["seven"]
    assert "polite_one" not in sys.modules
    assert plugins.load("seven") == 7
    with pytest.raises(ConfigError, match="known: seven"):
        plugins.load("eight")


@pytest.mark.parametrize("source", ["raise OSError('no disk')", "import not_there", "six = 6", "seven = '7'"])
def test_a_broken_package_is_named_when_it_is_asked_for_and_not_before(site, plugins, source):
    install(site, "broken_one", source, {GROUP: {"seven": "broken_one:seven"}})
    plugins.register("eight", 8)
    sys.modules.pop("broken_one", None)
    assert plugins.names() == ["eight", "seven"]
    assert plugins.load("eight") == 8
    with pytest.raises(ConfigError, match=r"seven is broken_one:seven of package broken.one 1\.0"):
        plugins.load("seven")


def test_a_name_that_is_taken_is_refused(site, plugins):
    install(site, "first_one", "seven = 7", {GROUP: {"seven": "first_one:seven", "ours": "first_one:seven"}})
    assert plugins.names() == ["seven"]
    with pytest.raises(ConfigError, match=r"rankflow's own and first_one:seven"):
        plugins.load("ours")
    with pytest.raises(ConfigError, match="another name"):
        plugins.register("seven", 8)
    with pytest.raises(ConfigError, match="not a number"):
        plugins.register("nine", "9")
    assert plugins.names() == ["seven"]
    install(site, "second_one", "seven = 77", {GROUP: {"seven": "second_one:seven"}})
    sys.path.insert(0, str(site / "elsewhere"))  # packages are looked for anew
    with pytest.raises(ConfigError, match=r"one 1.0 and .*one:seven of package"):
        plugins.load("seven")


@pytest.mark.parametrize("name", ["ours", "no name", ""])
def test_a_script_registers_under_a_free_name(plugins, name):
    with pytest.raises(ConfigError, match="name"):
        plugins.register(name, 8)
    assert plugins.names() == []


def test_what_was_registered_can_be_registered_anew(plugins):
    plugins.register("seven", 7)
    plugins.register("seven", 77)
    assert plugins.load("seven") == 77


def test_the_name_of_a_class_is_known_without_an_import(site, monkeypatch):
    monkeypatch.setattr(module, "_REGISTERED", {})
    install(site, "classy", "class Seven: pass", {GROUP: {"seven": "classy:Seven"}})

    class Eight:
        pass

    anything = Plugins(GROUP, list)
    anything.register("eight", Eight)
    assert name_of(GROUP, Eight) == "eight"
    assert name_of(GROUP, Path) is None
    assert "classy" not in sys.modules
    from classy import Seven  # type: ignore[import-not-found]

    assert name_of(GROUP, Seven) == "seven"


def test_a_module_in_the_working_directory_can_be_named(tmp_path, monkeypatch):
    (tmp_path / "own_module.py").write_text("import sys\nsys.own_module_ran = True\n")
    (tmp_path / "json.py").write_text("raise OSError\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "own_module_ran", False, raising=False)
    import_plugin("own_module")
    assert sys.own_module_ran  # type: ignore[attr-defined]
    import_plugin("json")  # Python's own
    for wrong in ("own_module.py", "not_there", str(tmp_path / "own_module")):
        with pytest.raises(ConfigError, match="plugin"):
            import_plugin(wrong)


@pytest.mark.parametrize(
    ("name", "snake"),
    [
        ("MyPolicy", "my_policy"),
        ("Trim", "trim"),
        ("LoRAPlus", "lo_ra_plus"),
        ("ABTest", "ab_test"),
        ("Top2Of", "top2_of"),
    ],
)
def test_classes_are_named_in_snake_case(name, snake):
    assert snake_case(name) == snake
