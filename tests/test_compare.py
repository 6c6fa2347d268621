import json

import pytest

import compare


def test_evaluations_side_by_side(tmp_path, capsys):
    for name, acc1 in {"static": 95.0, "adaptive": 94.5}.items():
        (tmp_path / name).mkdir()
        result = {"acc1": acc1, "depth_mean": 6.0, "gmacs": 0.0123}
        (tmp_path / name / "eval.json").write_text(json.dumps(result))
    compare.main([str(tmp_path / "static"), str(tmp_path / "adaptive")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["static", "95.00", "%", "6.00", "12.3", "M"]
    assert lines[2].split()[0] == "adaptive"


def test_a_folder_without_evaluation(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        compare.main([str(tmp_path)])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("compare.py: error: no evaluation")
