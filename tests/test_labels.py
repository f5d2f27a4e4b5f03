"""Which images have labels in cmsf_semi.py, what the classifier learns, and what stays hidden."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scripts import (
    CPU,
    assert_same_state,
    checkpoint,
    data_of,
    labelled_pictures,
    picture,
    small_model,
    tiny,
    unit,
)

import cmsf_semi

pytestmark = pytest.mark.usefixtures("small_networks")


def choose(labels, data, seed=0):
    args = replace(cmsf_semi.RECIPES["digits"], labels=labels, label_seed=seed)
    return cmsf_semi.choose_labels(args, data)


# ---- shares


@pytest.mark.parametrize(
    "share, counts",
    [("1pct", [1, 1, 1]), ("10pct", [5, 1, 1]), ("39pct", [20, 3, 1]), ("100pct", [50, 7, 1])],
)
def test_a_share_is_of_each_class_and_repeats_with_its_seed(share, counts):
    data = data_of(None, [0] * 50 + [1] * 7 + [2] + [-1] * 20)
    given = choose(share, data)
    assert [(given == label).sum() for label in range(3)] == counts
    assert ((given == data.labels) | (given == -1)).all()
    assert torch.equal(given, choose(share, data))
    assert torch.equal(given, choose(share, data, seed=1)) == (share == "100pct")


def test_labels_that_cannot_be_given_are_answered_by_one_line():
    with pytest.raises(SystemExit, match="^--labels x.txt: neither 1pct to 100pct nor a file$"):
        choose("x.txt", data_of(None, [0, 1]))
    with pytest.raises(SystemExit, match="^--labels 10pct gives no training image a label$"):
        choose("10pct", data_of(None, [-1, -1]))
    Path("list.txt").touch()
    with pytest.raises(SystemExit, match=r"^--labels list.txt: a list needs image files; [^\n]*$"):
        choose("list.txt", data_of(None, [0, 1]))


# ---- lists


@pytest.fixture
def data():
    """Two classes; 1.jpg is in both, a.jpg and b.jpg in one."""
    for name in ("cat/1.jpg", "cat/a.jpg", "dog/1.jpg", "dog/b.jpg", "unlabelled/u.jpg"):
        picture(f"photos/train/{name}")
    return cmsf_semi.ImageData(tiny(cmsf_semi), True, CPU)


def chosen(data, content):
    """The names of the images that a list chooses."""
    Path("list.txt").write_bytes(content.encode())
    given = choose("list.txt", data)
    assert torch.equal(given[given >= 0], data.labels[given >= 0])
    return {data.paths[i].removeprefix("photos/train/") for i in (given >= 0).nonzero().flatten()}


def test_a_line_is_the_end_of_a_path(data):
    absolute = Path("photos/train/cat/1.jpg").absolute()
    for line in ("cat/1.jpg", "./cat/1.jpg", "cat\\1.jpg", "train/cat/1.jpg", absolute):
        assert chosen(data, f"{line}") == {"cat/1.jpg"}
        # Spaces, the ends of lines of Windows, empty lines, and a byte order mark:
        assert chosen(data, f"  {line}  \r\n\r\na.jpg\n{line}\n") == {"cat/1.jpg", "cat/a.jpg"}
        assert chosen(data, f"\ufeff{line}\nb.jpg") == {"cat/1.jpg", "dog/b.jpg"}


def test_lines_that_do_not_fit_are_named(data):
    """Two match; one that is no whole name; one without a label; and one more, not shown."""
    with pytest.raises(SystemExit) as caught:
        chosen(data, "1.jpg\na.jpg\nt/1.jpg\nu.jpg\nx.jpg")
    root = Path("photos/train").absolute()
    assert str(caught.value) == (
        "list.txt: 4 line(s) do not name one labelled image: "
        f"1.jpg (2 match; of this name: {root}/cat/1.jpg, {root}/dog/1.jpg), "
        f"t/1.jpg (0 match; of this name: {root}/cat/1.jpg, {root}/dog/1.jpg), "
        "u.jpg (0 match; of this name: none)"
    )


# ---- the classifier


def test_a_round_is_ten_passes_over_the_cached_images_with_given_labels():
    """Batches of at most 256, SGD 0.01, momentum 0.9, weight decay 1e-4, anew in each round."""
    given = torch.arange(500) % 3
    given[300:450] = -1
    model = small_model(cmsf_semi, num_images=500, given=given)
    model.cache[:400] = unit(400, 8)  # of 300 images with given labels, and 100 others
    model.cached[:400] = True
    slow = copy.deepcopy(model.classifier).train().requires_grad_(True)
    torch.manual_seed(1)
    model.train_classifier()
    model.train_classifier()
    torch.manual_seed(1)
    for number in range(20):
        if number % 10 == 0:
            weights = slow.parameters()
            optimizer = torch.optim.SGD(weights, 0.01, momentum=0.9, weight_decay=1e-4)
        order = torch.randperm(300)
        for batch in (order[:150], order[150:]):
            scores = slow(model.cache[batch]).log_softmax(dim=1)
            loss = -scores[torch.arange(150), given[batch]].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for ours, expected in zip(model.classifier.parameters(), slow.parameters()):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
        assert not ours.requires_grad  # the optimizer of the method leaves it out
    assert model.classifier_trained


def test_nothing_is_predicted_before_there_are_two_images_to_learn_from():
    model = small_model(cmsf_semi, confidence=0.01)
    model.cached[0] = True  # one that has a given label
    weak, strong = torch.randn(2, 8, 3, 4, 4)
    indices = torch.arange(8)
    for coverage in (0, 1):
        model.train_classifier()
        _, metrics = model(weak, strong, indices, indices % 3)
        assert metrics["coverage"] == coverage


@pytest.mark.parametrize("batch_size, rounds", [(8, 4), (1024, 2)])
def test_a_round_comes_halfway_and_at_the_end_of_an_epoch(batch_size, rounds, monkeypatch):
    """Only at the end with large batches; two epochs of two steps here."""
    images = torch.zeros(2 * batch_size, 3, 16, 16, dtype=torch.uint8)
    labels = torch.arange(2 * batch_size) % 2
    monkeypatch.setattr(cmsf_semi, "load_split", lambda *given: (images, None, labels))
    calls = []
    monkeypatch.setattr(cmsf_semi.CMSF, "train_classifier", lambda model: calls.append(1))
    cmsf_semi.main(tiny(cmsf_semi, batch_size=batch_size, bank_size=batch_size))
    assert len(calls) == rounds


def test_under_100pct_only_images_without_a_label_need_a_classifier():
    labelled_pictures()
    args = tiny(cmsf_semi, labels="100pct")
    assert cmsf_semi.main(args)["classifier"] is None
    assert not any(name.startswith("classifier.") for name in checkpoint()["model"])
    picture("photos/train/unlabelled/1.jpg")
    result = cmsf_semi.main(replace(args, run_name="b"))
    assert 0 <= result["classifier"] <= 100
    assert (checkpoint("b")["model"]["given_labels"] >= 0).sum() == 16


def test_labels_that_are_not_given_change_nothing(monkeypatch):
    """Neither the loss, the search, the classifier nor the votes of the k-NN."""
    labelled_pictures()
    given = [f"photos/train/{name}/{i}.jpg" for name in ("cat", "dog") for i in range(4)]
    Path("list.txt").write_text("\n".join(given))
    args = tiny(cmsf_semi, labels="list.txt", confidence=0.1, epochs=3)
    result = cmsf_semi.main(args)
    state = checkpoint()
    assert (state["model"]["bank.labels"] >= 0).all()  # predictions were used

    def with_other_hidden_labels(args, is_train, load_split=cmsf_semi.load_split):
        images, paths, labels = load_split(args, is_train)
        if is_train:
            labels = [y if path in given else 1 - y for path, y in zip(paths, labels)]
        return images, paths, labels

    monkeypatch.setattr(cmsf_semi, "load_split", with_other_hidden_labels)
    other_result = cmsf_semi.main(replace(args, run_name="other"))
    for name in ("loss", "knn", "classifier"):
        assert other_result[name] == result[name]
    other = checkpoint("other")
    truths = state["model"].pop("bank.true_labels")  # which serve to measure
    assert not torch.equal(truths, other["model"].pop("bank.true_labels"))
    assert_same_state(state, other)


def test_a_run_does_not_continue_with_other_labels():
    labelled_pictures()
    args = tiny(cmsf_semi, labels="50pct")
    cmsf_semi.main(args)
    with pytest.raises(SystemExit, match="^runs/a had other labels: choose a new --run-name$"):
        cmsf_semi.main(replace(args, label_seed=1, epochs=3))
