"""Nothing that ships names the machine that made it."""

import json

from gallery.tidy import names_a_machine, shipped_files, tidy


def test_no_shipped_file_holds_a_path_of_a_machine():
    assert [path.name for path in shipped_files() if names_a_machine(path)] == []


def test_a_config_loses_its_path_and_nothing_else(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(
        json.dumps({"_name_or_path": "/home/ann/sd", "sample_size": 16, "nested": {"_name_or_path": "/tmp/x"}})
    )
    assert tidy(file)
    assert json.loads(file.read_text()) == {"sample_size": 16, "nested": {}}
    assert not tidy(file)
