"""The benchmark scripts at toy size, and the tables that the READMEs show of their results."""

import copy
import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
from safetensors.torch import load_file, save_file

import toy
from lohp_peft.adapters import AdapterLayout, CoreSpace
from lohp_peft.tasks import TextEncoder
from lohp_peft.weight_preparation import WeightPreparationConfig, prepare_trajectories

BENCHMARKS = toy.ROOT / "benchmarks"
METHODS = (
    "none",
    "mean_adapter",
    "nearest_adapter",
    "generated",
    "generated_raw",
    "wrong_task",
    "shuffled_labels",
    "adamw",
)


@pytest.fixture
def scripts(monkeypatch):
    """Loads scripts as if started from their folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return lambda name: toy.load_script(f"benchmarks/{name}.py")


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> list[str]:
    """Arguments that name a toy policy and its base model."""
    base_model = toy.save_base_model(tmp_path_factory.mktemp("base"))
    policy = toy.save_policy(tmp_path_factory.mktemp("policy"), base_model)
    return ["--policy", str(policy), "--base-model", str(base_model)]


def result_of(file: Path) -> dict:
    """A result file, after checking what all of them must say and must not say."""
    text = file.read_text()
    result = json.loads(text)
    assert {"date", "commit", "cores", "versions"} <= set(result["environment"])
    assert len(result["settings"]["policy"]["sha256"]) == 64
    for part in file.parents:
        assert len(part.name) < 4 or f"{part.name}/" not in text, f"a path in a result: {part}"
    return result


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_few_shot(scripts, subject, processes, tmp_path, monkeypatch, capsys):
    names = ["cr", "amazon_dvd"]
    monkeypatch.setenv("LOHP_DATA", str(toy.save_suite(tmp_path / "data", names)))
    few_shot = scripts("few_shot")
    line = [str(tmp_path / "work"), *subject, "--tasks", *names, "--shots", "4", "--draws", "2", "--max-test", "12"]
    line += ["--adamw-steps", "1", "--processes", str(processes), "--output", str(tmp_path / "result.json")]
    few_shot.main(line)
    result = result_of(tmp_path / "result.json")
    assert set(result["methods"]) == set(METHODS)
    assert set(result["tasks"]) == set(names)
    for method, row in result["methods"].items():
        each = [result["tasks"][name]["methods"][method] for name in names]
        assert row["accuracy"] == pytest.approx(fmean(one["accuracy"] for one in each))
        assert all(len(one["per_draw"]) == 2 for one in each)

    # continued, not repeated; and never with other settings
    (tmp_path / "work" / "cr.json").unlink()
    capsys.readouterr()
    if processes == 1:
        few_shot.main(line)
        assert "1 of 2 tasks are done already" in capsys.readouterr().out
        with pytest.raises(SystemExit, match="shots"):
            few_shot.main([*line, "--shots", "3"])


@pytest.mark.slow
def test_importing(scripts, subject, tmp_path, monkeypatch):
    names = ["mr", "subj"]
    monkeypatch.setenv("LOHP_DATA", str(toy.save_suite(tmp_path / "data", [*names, "cr"])))
    importing = scripts("importing")
    line = [
        *subject,
        "--tasks",
        *names,
        "--ranks",
        "2",
        "8",
        "--steps",
        "2",
        "--score-query-rows",
        "8",
    ]
    importing.main([*line, "--output", str(tmp_path / "result.json")])
    result = result_of(tmp_path / "result.json")
    assert set(result["kinds"]) == {"random A", "shared A"}
    for spaces in result["kinds"].values():
        assert set(spaces) == {"2", "8", "lora_b", "policy"}
        assert spaces["2"]["energy_kept"] < spaces["8"]["energy_kept"]
        for found in spaces.values():
            assert found["loss_exact"] == pytest.approx(spaces["2"]["loss_exact"], abs=1e-4)
            assert found["accepted"] == sum(run["refused"] is None for run in found["runs"])
    assert result["kinds"]["shared A"]["lora_b"]["energy_kept"] == pytest.approx(1, abs=1e-4)
    assert "| `core`, 2 |" in scripts("tables").importing(result)
    with pytest.raises(SystemExit):
        importing.main([*line, "--tasks", "cr"])


@pytest.fixture
def contrast(scripts, tmp_path, monkeypatch):
    """The contrast suite with every domain of every pair."""
    pairs = scripts("text_suite").CONTRAST_PAIRS.values()
    names = dict.fromkeys(name for p in pairs for group in (p.test, p.validation, *p.training) for name in group)
    monkeypatch.setenv("LOHP_DATA", str(toy.save_suite(tmp_path / "data", list(names))))
    return scripts("contrast")


@pytest.mark.slow
def test_contrast(contrast, scripts, subject, tmp_path, capsys):
    """All pairs; what is there is not run again, and never with other settings."""
    line = [str(tmp_path / "work"), *subject, "--shots", "6", "--draws", "2", "--max-test", "12", "--steps", "2"]
    line += ["--episodes", "1", "--validate-every", "1", "--validation-draws", "1", "--no-bf16"]
    line += ["--output", str(tmp_path / "result.json")]
    contrast.main(line)
    result = result_of(tmp_path / "result.json")
    assert list(result["pairs"]) == ["sentiment", "stance", "sarcasm"]
    methods = {"none", "mean", "floor", "ours", "ours_swapped", "specialist", "wrong_specialist"}
    rows = []
    for pair in result["pairs"].values():
        assert set(pair["labelings"]) == set(pair["derived"]) == {"class", "domain"}
        assert set(pair["runs"][0]["trained"]) == {"floor", "specialist_class", "specialist_domain"}
        assert pair["test_texts"] == 12
        for labeling in pair["labelings"].values():
            assert set(labeling) == methods
            assert all(len(row["per_draw"]) == 2 and 0 <= row["accuracy"] <= 1 for row in labeling.values())
            rows.append(labeling)
    for method, mean in result["overall"]["accuracy"].items():
        assert mean == pytest.approx(fmean(row[method]["accuracy"] for row in rows))
    table = scripts("tables").contrast(result)
    assert "| stance, by domain |" in table
    assert "* sarcasm: sarcasm_twitter, sarcasm_reddit, 12 test texts, at least 3 of each" in table

    (tmp_path / "work" / "stance-0.json").unlink()
    before = (tmp_path / "work" / "sentiment-0.json").stat().st_mtime_ns
    capsys.readouterr()
    contrast.main([*line, "--pairs", "stance"])
    assert "0 of 1 pairs are done already" in capsys.readouterr().out
    assert (tmp_path / "work" / "sentiment-0.json").stat().st_mtime_ns == before
    again = result_of(tmp_path / "result.json")["pairs"]  # the others are still in it
    assert list(again) == list(result["pairs"])
    assert again["stance"]["labelings"] == result["pairs"]["stance"]["labelings"]
    with pytest.raises(SystemExit, match="draws"):
        contrast.main([*line, "--draws", "3"])

    # an adapter trained elsewhere is scored on the finished pairs, and nothing else again
    policy = scripts("setting").LoHpPolicy.from_pretrained(subject[1])
    state = policy.reference_set.mean_state() / policy.scale
    save_file({"state": state}, tmp_path / "multi_task-0.safetensors")
    contrast.main([*line, "--fits", str(tmp_path)])
    added = result_of(tmp_path / "result.json")
    for name, pair in added["pairs"].items():
        for labeling, scored in pair["labelings"].items():
            assert scored["multi_task"]["per_draw"] == scored["mean"]["per_draw"]  # here the same adapter
            assert {**scored, "multi_task": None} == {**again[name]["labelings"][labeling], "multi_task": None}
            derived, ours = pair["derived"][labeling], scored["ours"]["per_draw"]
            each = [a - b for a, b in zip(ours, scored["mean"]["per_draw"], strict=True)]
            assert derived["ours_minus_multi_task"] == pytest.approx(fmean(each))
            assert derived["standard_errors"]["ours_minus_multi_task"] == pytest.approx(stdev(each) / 2**0.5)
    assert "| generated minus the multi-task adapter, points |" in scripts("tables").contrast(added)

    # a second training seed is further files, of one policy; it has not seen the adapter that was trained elsewhere
    other = tmp_path / "other_policy"
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn(parameter.shape))
    policy.save_pretrained(other)
    second = [*line[:1], *(str(other) if part == subject[1] else part for part in line[1:]), "--seed", "1"]
    with pytest.raises(SystemExit, match=r"sarcasm-0\.json, .* hold seed 0 of another policy"):
        contrast.main([*second, "--seed", "0"])
    contrast.main([*second, "--pairs", "stance"])
    assert len(result_of(tmp_path / "result.json")["overall"]["of_seeds"]) == 1  # not all pairs have it yet
    contrast.main(second)
    both = result_of(tmp_path / "result.json")
    assert both["settings"]["policy"] == added["settings"]["policy"]
    for name, pair in both["pairs"].items():
        assert [run["seed"] for run in pair["runs"]] == [0, 1]
        assert pair["runs"][0]["policy"] != pair["runs"][1]["policy"]
        alone = json.loads((tmp_path / "work" / f"{name}-1.json").read_text())["labelings"]
        for labeling, methods in pair["labelings"].items():
            first = added["pairs"][name]["labelings"][labeling]
            assert methods["multi_task"] == first["multi_task"]
            for method, row in alone[labeling].items():
                draws = zip(row["per_draw"], first[method]["per_draw"], strict=True)
                assert methods[method]["per_draw"] == pytest.approx([fmean(pair) for pair in draws])
                assert methods[method]["accuracy_of_seeds"] == [first[method]["accuracy"], row["accuracy"]]
    assert both["overall"]["of_seeds"][0]["accuracy"] == pytest.approx(added["overall"]["accuracy"])
    assert both["overall"]["of_seeds"][0] != both["overall"]["of_seeds"][1]
    means = [seed["accuracy"]["ours"] for seed in both["overall"]["of_seeds"]]
    assert both["overall"]["accuracy"]["ours"] == pytest.approx(fmean(means))
    percent = scripts("rendering").percent
    assert f": generated {percent(means[0])}, {percent(means[1])};" in scripts("tables").contrast(both)

    # until one is given that was trained in its weight space, with its seed
    save_file({"state": torch.randn(state.shape)}, tmp_path / "multi_task-1.safetensors")
    contrast.main([*second, "--fits", str(tmp_path)])
    for name, pair in result_of(tmp_path / "result.json")["pairs"].items():
        for labeling, methods in pair["labelings"].items():
            before = both["pairs"][name]["labelings"][labeling]
            assert {**methods, "multi_task": None} == {**before, "multi_task": None}
            assert methods["multi_task"]["accuracy_of_seeds"][:1] == before["multi_task"]["accuracy_of_seeds"]
            assert len(methods["multi_task"]["accuracy_of_seeds"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("pair", "domains", "classes"), [("sentiment", 3, 2), ("stance", 2, 3), ("sarcasm", 2, 2)])
def test_contrast_supports_are_balanced(contrast, pair, domains, classes):
    pool = contrast.pool(contrast.CONTRAST_PAIRS[pair].test, max_test=30)
    cells = domains * classes
    for labeling, size in (("class", classes), ("domain", domains)):
        support = pool.draw(6, labeling, seed=0)
        assert len(support) == 6 * size
        assert support.targets.bincount().tolist() == [6 * size // cells] * cells  # every domain with every class
        assert pool.labels(support.targets, labeling).bincount().tolist() == [6] * size
    words = [toy.BAD, *([toy.PLAIN] if classes == 3 else []), toy.GOOD]  # labels in alphabetical order
    for text, cell in zip(pool.test.texts, pool.test.targets, strict=True):
        assert text.split()[0] in words[int(pool.labels(cell, "class"))]
    assert pool.test.targets.bincount().tolist() == [30 // cells] * cells
    with pytest.raises(SystemExit, match="multiple"):
        pool.draw(5, "class", seed=0)
    with pytest.raises(SystemExit, match="has only 16"):
        pool.draw(60, "class", seed=0)
    with pytest.raises(SystemExit, match=f"at least {cells}"):
        contrast.pool(contrast.CONTRAST_PAIRS[pair].test, max_test=cells - 1)


def test_contrast_pairs_test_what_was_not_trained_on(scripts):
    suite = scripts("text_suite")
    for pair in suite.CONTRAST_PAIRS.values():
        assert set(pair.training) <= set(suite.CONTRAST_TRAINING)
        trained = {name for group in pair.training for name in group}
        assert set(pair.test) <= {*suite.TEST, *suite.VALIDATION}
        assert not trained & {*suite.TEST, *suite.VALIDATION}
        assert pair.validation in pair.training or set(pair.validation) <= set(suite.VALIDATION)


def test_contrast_pool_of_trained_domains(contrast, monkeypatch):
    """Support and test rows are different ones of split test, and no text of two domains is in either."""
    names, pools = contrast.CONTRAST_PAIRS["stance"].validation, sys.modules["pools"]
    first, second = pools.load_tasks(names)
    texts = tuple(f"{split} {i}" for i, split in enumerate(first.splits))
    first = replace(first, examples=replace(first.examples, texts=texts))
    shared = texts.index(next(text for text in texts if text.startswith("test")))
    other = (texts[shared], *second.examples.texts[1:])
    second = replace(second, examples=replace(second.examples, texts=other))
    monkeypatch.setattr(pools, "load_tasks", lambda names: [first, second])
    pool = contrast.pool(names, max_test=1000, trained_on=True)
    assert not set(pool.train.texts) & set(pool.test.texts)
    found = {*pool.train.texts, *pool.test.texts}
    assert {text for text in texts if text.startswith("test")} - {texts[shared]} < found
    assert texts[shared] not in found
    assert not any(text.startswith("train") for text in found)
    assert sorted(pool.train.targets.bincount().tolist()) == [8] * 6


def accuracies(*values: float) -> dict[str, dict[str, float]]:
    names = ("floor", "ours", "ours_swapped", "specialist", "wrong_specialist")
    rows = ({"accuracy": value, "per_draw": [value], "accuracy_of_seeds": [value]} for value in values)
    return dict(zip(names, rows, strict=True))


def test_contrast_differences(scripts):
    contrast = scripts("contrast")
    labelings = {
        "class": accuracies(0.60, 0.65, 0.50, 0.70, 0.40),
        "domain": accuracies(0.90, 0.88, 0.85, 0.904, 0.90),
    }
    negative = {"class": accuracies(0.80, 0.81, 0.80, 0.70, 0.695)}
    found = contrast.summarise({"a": {"labelings": labelings}, "b": {"labelings": negative}})
    derived = found["pairs"]["a"]["derived"]
    assert derived["class"]["share_of_the_way"] == pytest.approx(0.5)
    assert derived["class"]["ours_minus_swapped"] == pytest.approx(0.15)
    assert derived["class"]["specialist_minus_wrong"] == pytest.approx(0.3)
    assert derived["domain"]["share_of_the_way"] is None  # 0.4 points are no distance
    assert found["pairs"]["b"]["derived"]["class"]["share_of_the_way"] is None
    overall = found["overall"]
    assert overall["labelings"] == 3
    assert overall["specialists_differ"] == 1
    assert overall["ours_minus_floor"] == pytest.approx((0.05 - 0.02 + 0.01) / 3)
    assert overall["ours_minus_swapped"] == pytest.approx((0.15 + 0.03 + 0.01) / 3)
    assert overall["share_of_the_way"] == pytest.approx((0.05 - 0.02) / (0.1 + 0.004))
    assert contrast.summarise({"b": {"labelings": negative}})["overall"]["share_of_the_way"] is None
    assert scripts("rendering").share(None) == "-"


def test_contrast_counts_domains_and_classes_alike(scripts):
    contrast = scripts("contrast")
    test = contrast.Examples(tuple("abcde"), (0, 0, 0, 1, 2), tuple("0123"))  # by class 0 0 0 1 0, by domain 0 0 0 0 1
    pool = contrast.Pool(test, test, domains=2, classes=2)
    predicted = torch.tensor([0, 0, 1, 1, 1])
    assert pool.accuracy(predicted, "class") == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert pool.accuracy(predicted, "domain") == pytest.approx((2 / 3 + 0 + 1) / 3)


@pytest.fixture
def compare(scripts, tmp_path, monkeypatch):
    """The comparison on a suite that has every training and validation task it asks for."""
    suite = scripts("text_suite")
    names = [*suite.VALIDATION, *(name for group in suite.CONTRAST_TRAINING for name in group), "cr", "amazon_dvd"]
    monkeypatch.setenv("LOHP_DATA", str(toy.save_suite(tmp_path / "data", names)))
    return scripts("compare")


COMPARE = ["--tasks", "cr", "amazon_dvd", "--shots", "4", "--draws", "2", "--max-test", "12"]


@pytest.mark.slow
def test_compare(compare, scripts, subject, tmp_path, capsys):
    line = [str(tmp_path / "work"), *subject, *COMPARE, "--steps", "2", "--episodes", "1", "--seeds", "0", "1"]
    line += ["--validation-episodes", "2", "--output", str(tmp_path / "result.json")]
    quick = ["none", "none_linear_probe", "mean", "nearest", "multi_task", "text_to_lora_sft", "ours_raw", "ours"]
    compare.main([*line, "--methods", *quick])
    result = result_of(tmp_path / "result.json")
    rows = result["shots"]["4"]
    controls = {f"{m} | {c}" for m in ("text_to_lora_sft", "ours_raw") for c in compare.CONTROLS}
    assert set(rows) == {*quick, *controls}
    assert rows["multi_task"]["seeds"] == 2
    assert set(result["trained"]) == {f"{m}-{s}" for m in ("multi_task", "text_to_lora_sft") for s in (0, 1)}
    for row in rows.values():
        assert 0 <= row["accuracy"] <= 1
        assert row["interval"][0] <= row["accuracy"] <= row["interval"][1]
    ours = [fmean(task["ours/0/4/"]["per_draw"]) for task in result["tasks"].values()]
    mean = [fmean(task["mean/0/4/"]["per_draw"]) for task in result["tasks"].values()]
    assert rows["mean"]["ours_minus_it"]["mean"] == pytest.approx(fmean(ours) - fmean(mean))
    assert len(rows["mean"]["ours_minus_it"]["families"]) == 2

    # what is there is not run again, what is asked for in addition is
    before = (tmp_path / "work" / "fits" / "multi_task-1.safetensors").stat().st_mtime_ns
    compare.main([*line, "--methods", *quick, "best_by_support_loss", "adamw_10"])
    after = result_of(tmp_path / "result.json")["tasks"]
    assert (tmp_path / "work" / "fits" / "multi_task-1.safetensors").stat().st_mtime_ns == before
    assert all(
        after[name][key] == entry for name, entries in result["tasks"].items() for key, entry in entries.items()
    )
    assert {"adamw_10/0/4/", "best_by_support_loss/0/4/"} < set(after["cr"])
    with pytest.raises(SystemExit, match="draws"):
        compare.main([*line, "--methods", "none", "--draws", "3"])

    # another policy beside the compared one; here the same, by another name
    compare.main([*line, "--methods", "none", "--controls", "wrong_task", "--policies", f"twin={subject[1]}"])
    everything = result_of(tmp_path / "result.json")["shots"]["4"]
    assert set(everything) == {*rows, "best_by_support_loss", "adamw_10", "twin", "twin | wrong_task"}
    names = list(everything)
    assert names.index("multi_task") < names.index("twin") < names.index("ours_raw")
    for control in ("", " | wrong_task"):
        assert everything[f"twin{control}"]["accuracy"] == rows[f"ours_raw{control}"]["accuracy"]

    # or another training seed of the compared one, under the name of the method
    compare.main([*line, "--methods", "none", "--controls", "--policies", f"ours={subject[1]}"])
    seeds = result_of(tmp_path / "result.json")["shots"]["4"]["ours"]
    assert seeds["seeds"] == 2
    assert seeds["accuracy_of_seeds"] == [rows["ours"]["accuracy"]] * 2
    assert "ours (2 seeds: " in scripts("compared").compare_more(result_of(tmp_path / "result.json"))  # in the table
    for wrong, message in {f"multi_task={subject[1]}": "does not come from a policy", "ours": "NAME=FOLDER"}.items():
        with pytest.raises(SystemExit):
            compare.main([*line, "--methods", "none", "--policies", wrong])
        assert message in capsys.readouterr().err

    # and the same as the few-shot suite says, where both say something
    few_shot = [str(tmp_path / "few_shot"), *subject, *COMPARE, "--output", str(tmp_path / "few_shot.json")]
    same = {"none": "none", "mean": "mean_adapter", "nearest": "nearest_adapter", "ours_raw": "generated_raw"}
    same |= {"ours": "generated", "ours_raw | wrong_task": "wrong_task"}
    scripts("few_shot").main([*few_shot, "--methods", *same.values()])
    for mine, theirs in same.items():
        expected = result_of(tmp_path / "few_shot.json")["methods"][theirs]
        assert rows[mine]["accuracy"] == pytest.approx(expected["accuracy"]), mine
        assert rows[mine]["macro_f1"] == pytest.approx(expected["macro_f1"]), mine


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_compare_on_a_gpu(compare, subject, tmp_path):
    """With the base model there the scores are those of the CPU, whatever a method keeps where."""
    methods = ["none", "none_linear_probe", "mean", "nearest", "best_by_support_loss", "adamw_10", "multi_task"]
    methods += [
        "lorahub",
        "eva_80",
        "reptile_5",
        "text_to_lora_sft",
        "multi_task_steps",
        "ours_raw",
        "ours",
        "ours_steps",
    ]
    line = [*subject, *COMPARE, "--steps", "2", "--episodes", "1", "--validation-episodes", "2", "--methods", *methods]
    found = {}
    for device in ("cpu", "cuda"):
        file = tmp_path / f"{device}.json"
        compare.main([str(tmp_path / device), *line, "--device", device, "--output", str(file)])
        found[device] = result_of(file)["shots"]["4"]
    assert set(found["cuda"]) == set(found["cpu"])
    for name, row in found["cuda"].items():  # a text of 48 may lie on a boundary, and training rounds otherwise
        assert row["accuracy"] == pytest.approx(found["cpu"][name]["accuracy"], abs=0.1), name


@pytest.mark.slow
def test_compare_with_fewer_draws(compare, scripts, subject, tmp_path, monkeypatch):
    """A method whose support sets cost minutes gets the first ones, and is paired with ours on these."""
    monkeypatch.setattr(compare.METHODS["none"], "most_draws", 1)
    options = compare.parse(
        [str(tmp_path), *subject, *COMPARE, "--controls", "--methods", "none", "none_prototype", "ours_raw"]
    )
    names = options.tasks
    for name in names:
        compare.score_task(name, list(compare.cells(options)), options)
    tasks = {name: json.loads((tmp_path / "tasks" / f"{name}.json").read_text()) for name in names}
    for task in tasks.values():
        assert [len(task[f"{method}/0/4/"]["per_draw"]) for method in options.methods] == [1, 2, 2]
    rows = compare.summarise(tasks, list(tasks["cr"]), 4, ours=("ours_raw",))
    first = [task["ours_raw/0/4/"]["per_draw"][0] for task in tasks.values()]
    assert rows["none"]["draws"] == 1
    assert "draws" not in rows["none_prototype"]
    assert rows["none"]["ours_raw_minus_it"]["mean"] == pytest.approx(fmean(first) - rows["none"]["accuracy"])
    assert "none (1 draw)" in scripts("compared")._methods("", rows)
    seconds = rows["ours_raw"]["seconds"]
    for task in tasks.values():  # seconds on an accelerator are none of a CPU's
        task["ours_raw/other/4/"] = {**task["ours_raw/0/4/"], "seconds": 1e6, "device": "cuda"}
        task["none/0/4/"]["device"] = "cuda"
    rows = compare.summarise(tasks, list(tasks["cr"]), 4, ours=("ours_raw",))
    assert rows["ours_raw"]["seconds"] == seconds
    assert rows["none"]["seconds"] is None
    assert scripts("compared")._methods("", {"none": rows["none"]}).rstrip().endswith("|  |")


@pytest.mark.slow
def test_compare_scores_an_encoder_tuned_below_on_texts_read_anew(compare, scripts, subject, tmp_path, monkeypatch):
    """The frozen layers are read once for all methods; one that changes them is not scored on them."""
    base, made = scripts("methods/base"), []

    class Embeddings(base.Method):
        """The base model with other word embeddings."""

        def adapt(self, setting, tensors, support, told=None):
            model = copy.deepcopy(setting.encoder.base_model)
            with torch.no_grad():
                model.get_input_embeddings().weight.copy_(torch.randn(model.get_input_embeddings().weight.shape))
            encoder = scripts("setting").encoder_of(setting.policy, model, setting.encoder.tokenizer)
            examples = support.examples
            head = setting.solve(encoder.embed(encoder.prepare(examples.texts, examples.texts_b)), examples)
            made.append((encoder, head))
            return base.Adapted(head, encoder=encoder, tuned_below=True)

    monkeypatch.setitem(compare.METHODS, "none", Embeddings())
    options = compare.parse(
        [str(tmp_path), *subject, "--tasks", "cr", "--shots", "4", "--draws", "1", "--controls", "--methods", "none"]
    )
    compare.score_task("cr", list(compare.cells(options)), options)
    ((encoder, head),), (task,) = made, compare.load_tasks(["cr"])
    test, frozen = task.split("test"), compare.load_setting(subject[1], subject[3]).encoder

    def accuracy(reader) -> float:
        embeddings = encoder.embed(reader.prepare(test.texts, test.texts_b))
        return float((head.logits(embeddings).argmax(-1) == test.targets).float().mean())

    found = json.loads((tmp_path / "tasks" / "cr.json").read_text())["none/0/4/"]["accuracy"]
    assert found == pytest.approx(accuracy(encoder)) != accuracy(frozen)


@pytest.mark.slow
def test_every_method_gives_a_classifier(compare, scripts, subject, monkeypatch):
    """All of the field, trained where they are trained, on one support set."""
    methods = scripts("methods/__init__")
    conditional = methods.METHODS["weight_diffusion_conditional"]
    monkeypatch.setattr(conditional, "most", 1e9)  # hardly trained, every latent would be at the bound
    setting = compare.load_setting(subject[1], subject[3])
    (task,) = compare.load_tasks(["cr"])
    support = setting.support(task.draw_support(6, 0), 0)
    fitting = scripts("fitting")
    encoder = fitting.encoder_of(setting.policy, *fitting.load_base_model(subject[3], "eager"))
    training = fitting.training_of(setting, encoder, fitting.split_of("test"), fitting.Budget(2, 1, 1, 2, 20), seed=0)
    with pytest.raises(ValueError, match="learns from recorded adapters"):
        methods.METHODS["drag_and_drop"].fit(training)
    line = ["work", *subject, "--methods", "drag_and_drop", "setfit", "local_denoising"]
    monkeypatch.setattr(compare.METHODS["setfit"], "requires", ("setfit", "no_such_package"))
    with pytest.raises(
        SystemExit, match="setfit needs the packages no_such_package; drag_and_drop learns .*; local_d"
    ):
        compare.check_available([("drag_and_drop", 0), ("local_denoising", 0)], compare.parse(line))
    names = training.sampler.names
    paths = torch.randn(8, 5, *setting.policy.space.shape).cumsum(1) * 0.1 * setting.policy.scale
    training.recordings = [names[i % 4] for i in range(8)], paths
    states, fitted = {}, {}
    for name, method in methods.METHODS.items():
        fitted[name] = tensors = method.fit(training) if method.trained else {}
        adapted = method.adapt(setting, tensors, support)
        assert adapted.head.weight.shape == (2, 16), name
        assert adapted.head.weight.isfinite().all(), name
        if method.conditional:
            other = method.adapt(
                setting, tensors, support, methods.CONTROLS["shuffled_labels"](setting, support, task)
            )
            unlabelled = name == "drag_and_drop"  # the same texts under other labels
            assert other.state.equal(adapted.state) == (unlabelled or not adapted.state.any()), name
        states[name] = adapted.state
    assert states["none"] is None
    assert states["mean"].equal(setting.policy.reference_set.mean_state())
    losses = setting.support_losses(support, setting.policy.reference_set.states)
    assert states["best_by_support_loss"].equal(setting.policy.reference_set.states[int(losses.argmin())])
    assert float(setting.support_losses(support, states["lorahub"][None])) <= float(
        setting.support_losses(support, 0 * states["lorahub"][None])
    )
    diffused, tensors = states["weight_diffusion"] / setting.policy.scale, fitted["weight_diffusion"]
    latents = (diffused.flatten() - tensors["mean"]) @ tensors["basis"].T / tensors["spread"]
    assert 0 < float(latents.abs().max()) < 1.01 * methods.METHODS["weight_diffusion"].most  # trained or not


TRAINED = "multi_task reptile family_specialists text_to_lora_sft text_to_lora_recon weight_diffusion local_denoising"


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED.split())
def test_a_stopped_training_ends_as_one_that_was_not(compare, scripts, subject, name, tmp_path, monkeypatch, capsys):
    """Killed after every single thing it keeps, and started again by the same command."""
    fitting = scripts("fitting")
    unfinished, best = sys.modules["methods.unfinished"].Unfinished, sys.modules["methods.optimise"].Best

    def size(self, states, episode, bank):
        """The larger, the better: toy tasks are so easy that the start would be kept, whatever came after."""
        return -states(self.training.features([episode], bank)).abs().mean()[None]

    monkeypatch.setattr(best, "_loss", size)
    budget, setting = fitting.Budget(10, 1, 5, 2, 20), fitting.load_setting(subject[1], subject[3])
    names = [task.name for task in fitting.split_of("test").training_tasks()]
    paths = torch.randn(8, 5, *setting.policy.space.shape).cumsum(1) * 0.1 * setting.policy.scale
    monkeypatch.setattr(fitting, "recordings_of", lambda *_: ([names[i % 4] for i in range(8)], paths))
    common = name, 1, "test", budget, (subject[1], subject[3], "cpu"), tmp_path
    fitting.fit(*common, tmp_path / "whole.safetensors")
    assert f"whole: {'review' if 'family' in name else 'training'} step" in capsys.readouterr().out
    save = unfinished.save

    def stop(self, step, **parts):
        save(self, step, **parts)
        raise KeyboardInterrupt

    monkeypatch.setattr(unfinished, "save", stop)
    stops = 0
    while not (tmp_path / "stopped.safetensors").exists():
        try:
            fitting.fit(*common, tmp_path / "stopped.safetensors")
        except KeyboardInterrupt:
            torch.rand(7)  # another process would have other random numbers
            stops += 1
            assert stops < 100, "it begins anew every time"
    assert stops >= 3
    assert sorted(file.name for file in tmp_path.iterdir() if "stop" in file.name) == ["stopped.safetensors"]
    whole, stopped = (load_file(tmp_path / f"{which}.safetensors") for which in ("whole", "stopped"))
    assert whole.keys() == stopped.keys()
    for key in whole.keys() - {"minutes"}:
        assert whole[key].equal(stopped[key]), key
    assert "family" in name or whole["validation_loss"] < 0


@pytest.mark.slow
def test_latency(scripts, subject, tmp_path, monkeypatch):
    monkeypatch.setenv("LOHP_DATA", str(toy.save_suite(tmp_path / "data", ["cr"])))
    latency = scripts("latency")
    line = [*subject, "--tasks", "cr", "--sizes", "2", "4", "8", "--repeats", "2", "--adamw-steps", "1"]
    line += ["--held-out", "cr", "--shots", "3"]
    latency.main([*line, "--output", str(tmp_path / "result.json")])
    result = result_of(tmp_path / "result.json")
    assert [row["texts"] for row in result["rows"]] == [4, 8, 6]  # two texts are fewer than two a class
    assert result["ratio_of_the_median_task"] == result["rows"][-1]["ratio"]
    assert result["ratio_of_the_median_size"] == pytest.approx(fmean(row["ratio"] for row in result["rows"][:2]))
    for row in result["rows"]:
        assert row["ratio"] == pytest.approx(row["adamw"] / row["generated"])
        assert row["ratio_bf16"] == pytest.approx(row["adamw_bf16"] / row["generated_bf16"])
        names = {"generated", "generated_bf16", "adamw", "adamw_bf16"}
        assert {name: len(times) for name, times in row["all_seconds"].items()} == dict.fromkeys(names, 2)
    assert result["bf16"]["ratio_of_the_median_task"] == result["rows"][-1]["ratio_bf16"]


@pytest.mark.slow
def test_warm_start(scripts, subject, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LOHP_DATA", str(toy.save_suite(tmp_path / "data", ["cr", "amazon_dvd"])))
    warm_start = scripts("warm_start")
    line = [str(tmp_path / "work"), *subject, "--tasks", "cr", "amazon_dvd", "--shots", "4", "--max-test", "12"]
    line += ["--checkpoints", "0", "1", "3", "--output", str(tmp_path / "result.json")]
    warm_start.main([*line, "--starts", "default", "eva"])
    first = result_of(tmp_path / "result.json")
    warm_start.main(line)  # adds the starts that are missing
    result = result_of(tmp_path / "result.json")
    assert list(result["starts"]) == ["default", "eva", "generated", "mean"]
    for name, task in first["tasks"].items():
        assert task["curves"].items() <= result["tasks"][name]["curves"].items()
    for start, row in result["starts"].items():
        curves = [task["curves"][start]["loss"] for task in result["tasks"].values()]
        assert row["loss"] == pytest.approx([fmean(each) for each in zip(*curves, strict=True)])
    for task in result["tasks"].values():  # no adapter yet, whatever A is
        assert task["curves"]["eva"]["loss"][0] == pytest.approx(task["curves"]["default"]["loss"][0], abs=1e-4)
    assert (tmp_path / "result.svg").read_text().startswith("<?xml")
    capsys.readouterr()
    (tmp_path / "work" / "cr.json").unlink()
    warm_start.main(line)
    assert "[1/1] cr" in capsys.readouterr().out  # the other one was not run again
    with pytest.raises(SystemExit):
        warm_start.main([*line, "--starts", "default", "reptile"])


def test_steps_to_a_loss(scripts):
    warm_start = scripts("warm_start")
    curve, steps = [1.0, 0.6, 0.5, 0.7], [0, 2, 10, 20]
    assert warm_start.steps_to(curve, steps, 0.8) == pytest.approx(1.0)
    assert warm_start.steps_to(curve, steps, 0.5) == 10.0
    assert warm_start.steps_to(curve, steps, 1.5) == 0.0
    assert warm_start.steps_to(curve, steps, 0.4) == float("inf")


@pytest.mark.slow
def test_scaling(scripts, tmp_path):
    file = tmp_path / "result.json"
    scripts("scaling").main(["--shapes", "MiniLM, 3 layers", "--repeats", "1", "--tasks", "2", "--output", str(file)])
    (row,) = json.loads(file.read_text())["rows"]
    assert row["modules"] == 18
    assert row["adapter_mb"] == pytest.approx(4 * 16 * (4 * 2 * 384 + 2 * (384 + 1536)) * 3 / 1e6)


@pytest.mark.slow
def test_training_cost(scripts, tmp_path):
    file = tmp_path / "result.json"
    scripts("training_cost").main(["--most", "1", "--steps", "2", "--rank", "2", "--output", str(file)])
    result = json.loads(file.read_text())
    rows = {row["varied"]: row for row in result["rows"]}
    assert rows["tasks"]["runs"] == 4 * 16
    assert rows["policy_steps"]["recordings_mb"] == pytest.approx(
        4 * 64 * 4 * 3 * 18 * 2**2 / 1e6
    )  # 3 states of 18 cores
    assert all(row["step_s"] > 0 for row in rows.values())
    assert "adapter: MiniLM, 3 layers" in scripts("tables").training_cost(result)
    assert file.with_suffix(".svg").read_text().startswith("<?xml")


@pytest.mark.slow
def test_transfer(scripts, subject, tmp_path, monkeypatch):
    """Both stages and the scores of a fold; what is there is not done again, and no family left out is trained."""
    suite = scripts("text_suite")
    groups = [name for group in suite.CONTRAST_TRAINING for name in group]
    of = {name: "stance" for name in groups if name.startswith("stance")} | {"stance_climate": "stance"}
    data = toy.save_suite(tmp_path / "data", [*suite.VALIDATION, *groups, "stance_climate"], of)
    monkeypatch.setenv("LOHP_DATA", str(data))
    transfer = scripts("transfer")
    line = [str(tmp_path / "work"), "--folds", "4", "--base-model", subject[3], "--cloning-steps", "1", "--draws", "2"]
    line += ["--training-steps", "1", "--episodes", "1", "--validation-episodes", "2"]
    line += ["--shots", "4", "--max-test", "8"]
    transfer.main([*line, "--output", str(tmp_path / "result.json")])
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result["tasks"]) == {"stance_climate", "stance_abortion", "stance_atheism"}
    assert set(result["families"]) == {"stance"}
    assert result["families"]["stance"]["tasks"] == 3
    fold = tmp_path / "work" / "fold_4"
    policy = json.loads((fold / "policy-0" / "config.json").read_text())
    trained = set(policy["provenance"]["training_tasks"])
    assert "amazon_software" in trained
    assert not any("stance" in name for name in trained)
    assert "| stance |" in scripts("tables").transfer(result)
    assert "By training seed" not in scripts("tables").transfer(result)
    files = [fold / "trajectories" / "cost.json", fold / "policy-0" / "cost.json"]
    untouched = [file.stat().st_mtime_ns for file in files]
    transfer.main([*line, "--output", str(tmp_path / "again.json")])
    assert json.loads((tmp_path / "again.json").read_text())["tasks"] == result["tasks"]

    # a second seed learns from the same recordings
    transfer.main([*line, "--seeds", "0", "1", "--output", str(tmp_path / "both.json")])
    assert [file.stat().st_mtime_ns for file in files] == untouched
    both = json.loads((tmp_path / "both.json").read_text())
    assert both["settings"]["seeds"] == [0, 1]
    assert [run["seed"] for run in both["folds"]] == [0, 1]
    assert both["folds"][0]["policy"] != both["folds"][1]["policy"]
    second = json.loads((tmp_path / "work" / "fold_4-1.json").read_text())["tasks"]
    for name, methods in both["tasks"].items():
        for method, row in methods.items():
            seeds = [tasks[name][method] for tasks in (result["tasks"], second)]
            assert row["accuracy_of_seeds"] == [of_seed["accuracy"] for of_seed in seeds]
            draws = zip(*(of_seed["per_draw"] for of_seed in seeds), strict=True)
            assert row["per_draw"] == pytest.approx([fmean(each) for each in draws])
    ours = both["all"]["methods"]["ours"]
    assert ours["accuracy"] == pytest.approx(fmean(ours["accuracy_of_seeds"]))
    table, percent = scripts("tables").transfer(both), scripts("rendering").percent
    assert f"; ours {', '.join(map(percent, ours['accuracy_of_seeds']))}; " in table

    # seeds that not all folds have are left out, and without one that all have there is no result
    other = json.loads((tmp_path / "work" / "fold_4-0.json").read_text())
    (tmp_path / "work" / "fold_3-2.json").write_text(json.dumps({**other, "seed": 2}))
    with pytest.raises(SystemExit, match=r"No training seed is finished on all folds of .*\[3, 4\]"):
        transfer.main([*line, "--output", str(tmp_path / "none.json")])


@pytest.mark.slow
def test_ablations(compare, scripts, subject, tmp_path, capsys):
    """Every variant; what is there is not trained again."""
    ablations = scripts("ablations")
    tasks = ablations.split_of("validation").training_tasks()
    model, tokenizer = scripts("setting").load_base_model(subject[3])
    layout = AdapterLayout.from_model(model, ["query", "value"])
    encoder = TextEncoder(model, tokenizer, CoreSpace.from_base_weights(model, layout, 2))
    config = WeightPreparationConfig(
        optimizers=("adamw", "sam"), optimizer_steps=6, record_every=1, score_query_rows=4
    )
    prepare_trajectories(tasks, encoder, tmp_path / "trajectories", config)
    line = [str(tmp_path / "work"), "--trajectories", str(tmp_path / "trajectories"), "--base-model", subject[3]]
    line += ["--cloning-steps", "2", "--training-steps", "2", "--rows-per-task", "20", "--episodes", "2"]
    ablations.main([*line, "--output", str(tmp_path / "result.json")])
    result = json.loads((tmp_path / "result.json").read_text())
    assert list(result["variants"]) == list(ablations.VARIANTS)
    first, *others = result["variants"].values()
    assert all(row["loss_minus_first"]["mean"] == pytest.approx(row["loss"] - first["loss"]) for row in others)
    assert "lambda 2" in scripts("tables").ablations(result)
    capsys.readouterr()
    (tmp_path / "work" / "cells" / "off_policy-0.json").unlink()
    ablations.main([*line, "--output", str(tmp_path / "again.json")])
    assert capsys.readouterr().out.startswith("off_policy-0 ")
    assert json.loads((tmp_path / "again.json").read_text())["variants"]["off_policy"]["loss"] == pytest.approx(
        result["variants"]["off_policy"]["loss"]
    )


def test_ablations_are_paired_by_seed(scripts):
    """A seed that only one of two variants has is in its means and not in the difference."""
    rest = {"accuracy": 0.5, "sharpness": 0.0, "minutes": 1.0}
    losses = {"lohp-0": [1.0, 2.0], "lohp-1": [5.0, 6.0], "off_policy-0": [1.5, 2.5], "on_policy-2": [1.0, 1.0]}
    cells = {key: {**rest, "loss": sum(each) / 2, "losses": each} for key, each in losses.items()}
    found = scripts("ablations").summarise(cells)
    assert (found["lohp"]["loss"], found["lohp"]["seeds"]) == (3.5, 2)
    assert found["off_policy"]["loss_minus_first"] == {"mean": 0.5, "low": 0.5, "high": 0.5, "seeds": 1}
    assert "loss_minus_first" not in found["lohp"] | found["on_policy"]


def test_bootstrap_interval(scripts):
    setting = scripts("setting")
    assert setting.bootstrap_interval([0.02] * 5) == pytest.approx((0.02, 0.02))
    generator = random.Random(0)
    values = [generator.gauss(1.0, 0.5) for _ in range(100)]
    low, high = setting.bootstrap_interval(values)
    assert low < fmean(values) < high
    assert high - low == pytest.approx(4 * 0.5 / 10, rel=0.3)  # about four standard errors
    # of tasks that go together there are fewer to count
    groups = [str(i // 4) for i in range(100)]
    grouped = setting.bootstrap_interval([values[i // 4] for i in range(100)], groups)
    assert grouped == pytest.approx(setting.bootstrap_interval(values[:25]))
    assert setting.with_interval([1.0, 1.0, 4.0], ["a", "a", "b"])["families"] == pytest.approx([1.0, 4.0])


def test_run_starts_only_what_is_missing(scripts, tmp_path, capsys):
    run = scripts("run")
    (tmp_path / "contrast.json").write_text("{}")
    run.main(["contrast", "latency", "--dry-run", "--results", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "contrast: has a result" in shown
    assert "latency.py" in shown
    assert all((BENCHMARKS / script).exists() for script, *_ in run.SUITES.values())
    with pytest.raises(SystemExit):
        run.main(["coffee"])


@pytest.mark.parametrize(
    "suite", ["few_shot", "compare", "compare_validation", "contrast", "transfer", "latency", "warm_start"]
)
def test_results_are_those_of_the_commands(scripts, suite):
    """What `make bench` runs is what the committed results were measured with."""
    script, *arguments = scripts("run").SUITES[suite]
    options = vars(scripts(script.removesuffix(".py")).parse(arguments))
    result = json.loads((BENCHMARKS / "results" / f"{suite}.json").read_text())
    settings = result["settings"]
    shared = settings.keys() & options.keys() - {"policy", "threads"}
    assert len(shared) > 1
    assert {key: settings[key] for key in shared} == {key: as_json(options[key]) for key in shared}
    if suite == "warm_start":
        assert set(result["starts"]) == set(options["starts"])
    if suite == "compare":
        assert set(options["methods"]) <= set(result["shots"]["16"])


def as_json(value):
    return json.loads(json.dumps(value))


ENVIRONMENT = {
    "date": "2026-01-02",
    "commit": "0123456789abcdef",
    "cores": 2,
    "device": "cpu",
    "versions": {"torch": "2"},
}
FEW_SHOT = {
    "settings": {
        "split": "test",
        "shots": 16,
        "draws": 3,
        "max_test": 500,
        "adamw_steps": 20,
        "adamw_learning_rate": 1e-3,
    },
    "processes": 2,
    "threads": 1,
    "environment": ENVIRONMENT,
    "methods": {
        "none": {"accuracy": 0.6123, "macro_f1": 0.6, "seconds": 0.1},
        "generated": {"accuracy": 0.6457, "macro_f1": 0.63, "seconds": 0.52},
    },
    "differences": {"generated - none": {"mean": 0.0334, "low": -0.001, "high": 0.06, "tasks_better": 1}},
    "tasks": {
        "cr": {
            "family": "sentiment",
            "classes": 2,
            "methods": {"none": {"accuracy": 0.6123}, "generated": {"accuracy": 0.6457}},
        }
    },
}


def test_tables(scripts, tmp_path):
    tables = scripts("tables")
    (tmp_path / "few_shot.json").write_text(json.dumps(FEW_SHOT))
    text = "before\n<!-- results:begin few_shot -->\nold\n<!-- results:end -->\nafter\n"
    filled = tables.filled(text, tmp_path)
    assert filled.startswith("before\n<!-- results:begin few_shot -->\n| ")
    assert filled.endswith("<!-- results:end -->\nafter\n")
    assert "| **generated** | 64.6 | 63.0 |" in filled
    assert "| generated - none | +3.3 | -0.1 to +6.0 | 1 of 1 |" in filled
    assert "commit 0123456789" in filled
    assert "old" not in filled
    assert tables.filled(filled, tmp_path) == filled
    assert "Not measured yet" in tables.block("contrast", tmp_path)
    with pytest.raises(SystemExit, match="coffee"):
        tables.block("coffee", tmp_path)


def test_readmes_show_the_results(scripts):
    """Fails where a README differs from the results: `python benchmarks/tables.py --write`."""
    tables = scripts("tables")
    blocks = 0
    for document in tables.DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        assert text == tables.filled(text), f"{document.name} is stale"
        blocks += len(tables.BLOCK.findall(text))
    assert blocks >= 5


def test_the_readme_says_what_the_results_say(scripts):
    """Numbers in its prose; where this fails a sentence has become untrue, or was reworded without `claims.py`."""
    assert scripts("tables").untrue() == []


def test_a_number_that_differs_is_found(scripts):
    results = {file.stem: json.loads(file.read_text()) for file in (BENCHMARKS / "results").glob("*.json")}
    text = (BENCHMARKS.parent / "README.md").read_text()
    wrong = text.replace(
        f"better on {results['compare']['shots']['16']['multi_task']['ours_minus_it']['tasks_better']} of",
        "better on 99 of",
    )
    (phrase,) = scripts("claims").missing(wrong, results)
    assert phrase.startswith("level with it")


def test_every_result_renders(scripts):
    tables = scripts("tables")
    for name in tables.BLOCKS:
        assert tables.block(name).strip()


def test_latency_by_steps(scripts):
    """Every measured number of AdamW's steps with what it reaches, fewest first."""

    def measured(steps: int, ratio: float) -> dict:
        ratios = {"ratio_of_the_median_task": ratio}
        others = [{"by": "size", "classes": 2, "ratio": 0.0}, {"by": "shots", "classes": 7, "ratio": 0.0}]
        rows = [{"by": "shots", "classes": 2, "ratio": 2 * ratio}, *others]
        rows = [{**row, "adamw_bf16": row["ratio"] / 2, "generated": 1.0} for row in rows]
        where = {"date": "2026-01-01", "cores": 2, "device": "cpu", "versions": {"torch": "2"}, "commit": None}
        return {**ratios, "bf16": ratios, "rows": rows, "settings": {"adamw_steps": steps}, "environment": where}

    methods = {
        f"adamw_{steps}": {"accuracy": 0.7 + steps / 1000, "ours_minus_it": {"mean": 0.01, "low": 0, "high": 0.02}}
        for steps in (10, 80)
    }
    table = scripts("tables").latency_by_steps(measured(80, 24), measured(10, 4), {"shots": {"16": methods}})
    few, many = table.splitlines()[2:]
    assert few.startswith("| 10 | 71.0 | +1.0 [+0.0, +2.0] | 4.0 | 8.0 | 4.0 | 2.0 | 2026-01-01")
    assert many.startswith("| 80 | 78.0 | +1.0 [+0.0, +2.0] | 24.0 | 48.0 | 24.0 | 12.0 |")


def test_the_way_to_all_rows(scripts):
    """Of a ceiling 20 points above no adapter, a method 5 points above it has gone a quarter."""
    few, many = ({"none": {"accuracy": none}, "ours": {"accuracy": none + 0.05}} for none in (0.5, 0.6))
    table = scripts("compared")._by_shots({"shots": {"4": few, "16": {**many, "adamw_full_data": {"accuracy": 0.7}}}})
    assert table.splitlines()[-1] == "| ours | 55.0 | 65.0 | 25.0 | 50.0 |"
    assert "all rows" not in scripts("compared")._by_shots({"shots": {"4": few, "16": many}})


def test_goals(scripts):
    """The rival is the best that takes no gradient; a goal is met on the right side of its bound."""
    goals = scripts("goals")

    def rival(accuracy: float, mean: float) -> dict:
        return {"accuracy": accuracy, "ours_minus_it": {"mean": mean, "low": mean - 0.01, "high": mean + 0.01}}

    methods = {"none": rival(0.6, 0.1), "multi_task": rival(0.68, 0.02), "adamw_80": rival(0.9, -0.2)}
    methods |= {"family_specialists": rival(0.8, -0.1), "ours_raw | wrong_task": rival(0.9, -0.2)}
    _, measured, met = goals._ahead("here", methods)
    assert met
    assert measured == "+2.0 [+1.0, +3.0] over multi task, 68.0"
    assert not goals._ahead("here", methods | {"sft": rival(0.69, 0.019)})[2]

    def family(mean: float) -> dict:
        return {"differences": {f"ours - {other}": rival(0, mean)["ours_minus_it"] for other in ("none", "mean")}}

    transferred = {"all": family(0.02), "families": {"topic": family(-0.005), "style": family(-0.02)}}
    (_, below, none_below), (_, _, above) = goals._transfer(transferred)
    assert below == "style - none -2.0, style - mean -2.0"
    assert (none_below, above) == (False, True)
    assert goals._transfer({**transferred, "families": {"topic": family(-0.005)}})[0][1:] == ("none below", True)

    warm = {"starts": {"generated": {"median_share_of_steps": None}}}
    assert goals._warm_start(warm)[1:] == ("never", False)
    warm["starts"]["generated"]["median_share_of_steps"] = 0.2
    assert goals._warm_start(warm)[1:] == ("0.20", True)
