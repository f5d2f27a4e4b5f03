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


@pytest.mark.parametrize("share", [1, 10, 37, 100])
def test_a_share_is_balanced_and_repeats_with_its_seed(share):
    data = cmsf_semi.ImageData(cmsf_semi.RECIPES["digits"], True, CPU)
    given = choose(f"{share}pct", data)
    assert torch.equal(given, choose(f"{share}pct", data))
    assert torch.equal(given, choose(f"{share}pct", data, seed=1)) == (share == 100)
    assert ((given == data.labels) | (given == -1)).all()
    for label in range(10):
        expected = max(1, round((data.labels == label).sum().item() * share / 100))
        assert (given == label).sum() == expected


def test_a_share_is_drawn_among_the_images_that_have_a_label():
    data = data_of(None, [0] * 50 + [1] + [-1] * 20)
    given = choose("10pct", data)
    assert (given == 0).sum() == 5
    assert (given == 1).sum() == 1  # one image at least
    assert (given == -1).sum() == 65
    assert torch.equal(choose("100pct", data), data.labels)


@pytest.mark.parametrize("labels", ["0pct", "101pct", "tenpct", "-5pct", "", "nowhere.txt"])
def test_what_is_neither_share_nor_file_is_answered_by_one_line(labels):
    with pytest.raises(SystemExit, match=r"^--labels .*: neither 1pct to 100pct nor a file$"):
        cmsf_semi.main(replace(cmsf_semi.RECIPES["digits"], labels=labels))
    assert not Path("runs").exists()


def test_data_without_any_label_is_answered_by_one_line():
    for i in range(16):
        picture(f"photos/{i}.jpg")
    with pytest.raises(SystemExit, match=r"^--labels 10pct gives no training image a label$"):
        cmsf_semi.main(tiny(cmsf_semi))


# ---- lists


@pytest.fixture
def data():
    """Two classes; 1.jpg and 2.jpg are in both, a.jpg and b.jpg in one."""
    for name in ("cat/1.jpg", "dog/1.jpg", "cat/images/2.jpg", "dog/images/2.jpg", "cat/a.jpg"):
        picture(f"photos/train/{name}")
    picture("photos/train/dog/b.jpg")
    picture("photos/train/unlabelled/u.jpg")
    return cmsf_semi.ImageData(tiny(cmsf_semi), True, CPU)


def chosen(data, content, encoding="utf-8"):
    """The names of the images that a list chooses."""
    Path("list.txt").write_bytes(content.encode(encoding))
    given = choose("list.txt", data)
    assert torch.equal(given[given >= 0], data.labels[given >= 0])
    return {data.paths[i].removeprefix("photos/train/") for i in (given >= 0).nonzero().flatten()}


@pytest.mark.parametrize("line", ["cat/1.jpg", "./cat/1.jpg", "cat\\1.jpg", "train/cat/1.jpg"])
def test_a_line_is_the_end_of_a_path(line, data):
    assert chosen(data, line) == {"cat/1.jpg"}
    assert chosen(data, f"  {line}  \n{line}\n") == {"cat/1.jpg"}
    assert chosen(data, f"{line}\r\na.jpg\r\n\r\n") == {"cat/1.jpg", "cat/a.jpg"}
    assert chosen(data, f"b.jpg\n{line}\n", "utf-8-sig") == {"cat/1.jpg", "dog/b.jpg"}


def test_a_line_may_be_an_absolute_path_or_several_folders_deep(data):
    assert chosen(data, str(Path("photos/train/dog/1.jpg").absolute())) == {"dog/1.jpg"}
    assert chosen(data, "dog/images/2.jpg") == {"dog/images/2.jpg"}


@pytest.mark.parametrize(
    "content, message",
    [
        ("1.jpg", r"1 line.s. .*: 1.jpg \(2 match; of this name: .*/cat/1.jpg, .*/dog/1.jpg\)"),
        ("images/2.jpg", r"1 line.s. .*: images/2.jpg \(2 match; .*/cat/.*, .*/dog/.*\)"),
        ("x.jpg\na.jpg\ny.jpg", r"2 line.s. .*: x.jpg \(0 match; of this name: none\), y.jpg .*"),
        ("t/1.jpg", r"1 line.s. .*: t/1.jpg \(0 match; .*/cat/1.jpg, .*\)"),  # whole names only
        (
            "u.jpg",
            r"1 line.s. .*: u.jpg \(0 match; of this name: none\)",
        ),  # an image without a label
        ("", "gives no training image a label"),
        ("\ufeff\r\n\r\n", "gives no training image a label"),
    ],
)
def test_a_list_that_does_not_fit_is_answered_by_one_line(content, message, data):
    with pytest.raises(SystemExit, match=rf"^(list.txt: |--labels list.txt ){message}$"):
        chosen(data, content)


def test_data_that_are_no_files_need_a_share():
    Path("list.txt").write_text("0.png")
    with pytest.raises(SystemExit, match=r"^--labels list.txt: a list needs image files; [^\n]*$"):
        cmsf_semi.main(replace(cmsf_semi.RECIPES["digits"], labels="list.txt"))


# ---- the classifier


def model_with_cache(n, given):
    """The first n images have embeddings in the cache."""
    model = small_model(cmsf_semi, num_images=len(given), given=given)
    model.cache[:n] = unit(n, 8)
    model.cached[:n] = True
    return model


def test_a_round_is_ten_passes_over_the_cached_images_with_given_labels():
    """Batches of at most 256, SGD 0.01, momentum 0.9, weight decay 1e-4, anew in each round."""
    given = torch.arange(500) % 3
    given[300:450] = -1
    model = model_with_cache(400, given)  # of 300 images with given labels, and 100 others
    slow = copy.deepcopy(model.classifier).train().requires_grad_(True)
    torch.manual_seed(1)
    model.train_classifier()
    model.train_classifier()
    torch.manual_seed(1)
    for number in range(20):
        if number % 10 == 0:
            velocities = [torch.zeros_like(weight) for weight in slow.parameters()]
        order = torch.randperm(300)
        for batch in (order[:150], order[150:]):
            scores = slow(model.cache[batch]).log_softmax(dim=1)
            loss = -scores[torch.arange(150), given[batch]].mean()
            gradients = torch.autograd.grad(loss, list(slow.parameters()))
            with torch.no_grad():
                for weight, gradient, velocity in zip(slow.parameters(), gradients, velocities):
                    velocity.mul_(0.9).add_(gradient + 1e-4 * weight)
                    weight.sub_(0.01 * velocity)
    for ours, expected in zip(model.classifier.parameters(), slow.parameters()):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
        assert not ours.requires_grad  # the optimizer of the method leaves it out
    assert model.classifier_trained


def test_nothing_is_predicted_before_the_first_round():
    model = small_model(cmsf_semi, confidence=0.01)
    weak, strong = torch.randn(2, 8, 3, 4, 4)
    indices = torch.arange(8)
    for coverage in (0, 1):
        _, metrics = model(weak, strong, indices, indices % 3)
        assert metrics["coverage"] == coverage
        model.train_classifier()


def test_without_two_cached_images_there_is_no_round():
    model = model_with_cache(1, torch.arange(40) % 3 - 1)
    model.train_classifier()
    assert not model.classifier_trained


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


def test_all_labels_build_no_classifier():
    labelled_pictures()
    result = cmsf_semi.main(tiny(cmsf_semi, labels="100pct"))
    assert result["classifier"] is None
    assert not any(name.startswith("classifier.") for name in checkpoint()["model"])


def test_unlabelled_images_beside_labels_have_a_classifier_under_100pct():
    labelled_pictures()
    for i in range(8):
        picture(f"photos/train/unlabelled/{i}.jpg")
    result = cmsf_semi.main(tiny(cmsf_semi, labels="100pct"))
    assert 0 <= result["classifier"] <= 100
    assert (checkpoint()["model"]["given_labels"] >= 0).sum() == 16


def test_labels_that_are_not_given_change_nothing(monkeypatch):
    """Neither the loss, the search, the classifier nor the votes of the k-NN."""
    labelled_pictures()
    args = tiny(cmsf_semi, labels="50pct", confidence=0.1, epochs=3)
    result = cmsf_semi.main(args)
    state = checkpoint()
    given = state["model"]["given_labels"]
    assert (state["model"]["bank.labels"] >= 0).all()  # predictions were used
    load_split = cmsf_semi.load_split

    def with_other_hidden_labels(args, is_train):
        images, paths, labels = load_split(args, is_train)
        if is_train:
            labels = torch.where(given >= 0, given, 1 - torch.tensor(labels))
        return images, paths, labels

    monkeypatch.setattr(cmsf_semi, "load_split", with_other_hidden_labels)
    monkeypatch.setattr(cmsf_semi, "choose_labels", lambda args, data: given)
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
