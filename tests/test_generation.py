"""Figures of generated pictures: against definitions, against torch-fidelity, and on files that are wrong."""

import hashlib
import io
import json
import zipfile
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from conftest import PICTURES, run_command
from PIL import Image
from processes import run_ranks

from flowmo.data import DataError
from flowmo.data.npz import NpzFile, write_npz
from flowmo.distributed import join
from flowmo.errors import FlowMoError
from flowmo.evaluate.generation import GenerationSummary, SetFeatures, extract_features, open_image_set
from flowmo.evaluate.metrics.features import Features, ResNetFeatures
from flowmo.evaluate.metrics.fid import Gaussian, StatisticsError, shuffled
from flowmo.evaluate.metrics.pairs import grid
from flowmo.evaluate.metrics.sets import inception_score, precision_and_recall
from flowmo.model.torchvision_import import import_torchvision


class Colours(torch.nn.Module):
    """A feature network of all three kinds that needs no weights."""

    name, is_fid = "colours", False

    def forward(self, images):
        mean, small = images.mean((2, 3)), torch.nn.functional.adaptive_avg_pool2d(images, 2)
        return Features(torch.cat((mean, images.std((2, 3))), 1), 3 * mean, small.flatten(1))


def random_pictures(count, seed=0, size=24):
    generator = torch.Generator().manual_seed(seed)
    tint = torch.rand(count, 3, 1, 1, generator=generator) * (1 + seed)
    return (torch.rand(count, 3, size, size, generator=generator) * tint * 255).clamp(0, 255).to(torch.uint8)


def as_folder(path, pictures):
    path.mkdir()
    for i, picture in enumerate(pictures):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path / f"{i:04d}.png")
    return path


def summary(ours, theirs):
    network = Colours()
    return GenerationSummary.of(
        extract_features(open_image_set(ours), network), extract_features(open_image_set(theirs), network), network
    )


def test_folder_and_npz_are_the_same(tmp_path):
    ours, theirs = random_pictures(30), random_pictures(25, 1)
    folders = as_folder(tmp_path / "a", ours), as_folder(tmp_path / "b", theirs)
    files = tmp_path / "a.npz", tmp_path / "b.npz"
    for file, pictures in zip(files, (ours, theirs), strict=True):
        write_npz(file, pictures.split(7), len(pictures))
    assert np.array_equal(np.load(files[0])["arr_0"], ours.permute(0, 2, 3, 1).numpy())
    one, other = summary(*folders), summary(*files)
    assert one == other
    assert one.frechet_distance > 0
    assert one.spatial_frechet_distance > 0
    assert (one.images, one.reference_images) == (30, 25)
    assert one.inception_score > 1
    assert not one.missing
    itself = summary(files[0], files[0])
    assert abs(itself.frechet_distance) < 1e-6
    assert (itself.precision, itself.recall) == (1, 1)


def test_reference_statistics_instead_of_pictures(tmp_path):
    ours, theirs = random_pictures(30), random_pictures(25, 1)
    write_npz(tmp_path / "a.npz", [ours], 30)
    write_npz(tmp_path / "b.npz", [theirs], 25)
    whole = summary(tmp_path / "a.npz", tmp_path / "b.npz")
    seen = extract_features(open_image_set(tmp_path / "b.npz"), Colours())
    gaussians = {kind: Gaussian.of(getattr(seen.features, kind)) for kind in ("pooled", "spatial")}
    (mean, covariance, _), (mean_s, covariance_s, _) = gaussians.values()
    np.savez(tmp_path / "ref.npz", mu=mean, sigma=covariance, mu_s=mean_s, sigma_s=covariance_s)  # as ADM's are
    part = summary(tmp_path / "a.npz", tmp_path / "ref.npz")
    assert part.frechet_distance == pytest.approx(whole.frechet_distance)
    assert part.spatial_frechet_distance == pytest.approx(whole.spatial_frechet_distance)
    assert part.precision is None
    assert "precision" in part.missing[0]
    assert torch.equal(NpzFile(tmp_path / "ref.npz").statistics("spatial")[1], covariance_s)


def test_statistics_of_a_file_win_over_its_pictures(tmp_path):
    """ADM's reference files: some images for precision and recall, statistics of the whole set for the distances."""
    linalg = pytest.importorskip("scipy.linalg")
    ours, whole = random_pictures(40), random_pictures(90, 1)
    some, network = whole[:25], Colours()

    def statistics(pictures):
        seen = network(pictures.float() / 127.5 - 1)
        return [(x.mean(0), np.cov(x, rowvar=False)) for x in (z.double().numpy() for z in (seen[0], seen[2]))]

    def distance(a, b):
        root = linalg.sqrtm(a[1] @ b[1]).real
        return ((a[0] - b[0]) ** 2).sum() + np.trace(a[1] + b[1] - 2 * root)

    (mu, sigma), (mu_s, sigma_s) = statistics(whole)
    np.savez(tmp_path / "a.npz", arr_0=ours.permute(0, 2, 3, 1).numpy())
    np.savez(tmp_path / "some.npz", arr_0=some.permute(0, 2, 3, 1).numpy())
    images = {"arr_0": some.permute(0, 2, 3, 1).numpy()}
    np.savez(tmp_path / "ref.npz", **images, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    found, by_images = (summary(tmp_path / "a.npz", tmp_path / name) for name in ("ref.npz", "some.npz"))
    pooled, spatial = statistics(ours)
    assert found.frechet_distance == pytest.approx(distance(pooled, (mu, sigma)), rel=1e-3)
    assert found.spatial_frechet_distance == pytest.approx(distance(spatial, (mu_s, sigma_s)), rel=1e-3)
    assert found.frechet_distance != pytest.approx(by_images.frechet_distance, rel=0.02)
    for name in ("precision", "recall", "kernel_distance", "inception_score", "reference_images"):
        assert getattr(found, name) == getattr(by_images, name)
    assert "the Fréchet distance is to the statistics" in found.lines()[0]
    assert not by_images.reference_statistics
    halves = np.mean([distance(statistics(shuffled(ours)[i::2])[0], (mu, sigma)) for i in range(2)])
    assert found.frechet_bias == pytest.approx(halves - distance(pooled, (mu, sigma)), rel=1e-2), "of ours alone"
    np.savez(tmp_path / "pooled.npz", **images, mu=mu, sigma=sigma)
    mixed = summary(tmp_path / "a.npz", tmp_path / "pooled.npz")
    assert mixed.frechet_distance == found.frechet_distance
    assert mixed.spatial_frechet_distance == by_images.spatial_frechet_distance


def test_distances_to_statistics_of_more_images_than_the_file_holds():
    """Of 10 images a covariance of 40 channels lives in a subspace; one of the whole set, beside them, does not."""
    linalg = pytest.importorskip("scipy.linalg")
    generator = torch.Generator().manual_seed(0)
    ours, some, whole = (torch.randn(n, 40, generator=generator) for n in (200, 10, 300))
    (mean, covariance), (mean_2, covariance_2) = ((x.double().mean(0), x.double().T.cov()) for x in (ours, whole))
    seen = SetFeatures(Features(ours))
    reference = SetFeatures(Features(some), {"pooled": Gaussian(mean_2, covariance_2)})
    root = linalg.sqrtm((covariance @ covariance_2).numpy()).real
    expected = float((mean - mean_2).square().sum() + covariance.trace() + covariance_2.trace()) - 2 * np.trace(root)
    assert GenerationSummary.of(seen, reference, Colours()).frechet_distance == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["resnet", "inception-legacy"])
def test_statistics_of_another_network_are_refused(kind, tmp_path, capsys, monkeypatch):
    class StandIn(Colours, ResNetFeatures):
        def __init__(self):
            torch.nn.Module.__init__(self)

    monkeypatch.setattr(
        "flowmo.evaluate.metrics.build_features", lambda kind: StandIn() if kind == "resnet" else Colours()
    )
    ours = as_folder(tmp_path / "a", random_pictures(30))
    theirs = random_pictures(25, 1).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "b.npz", arr_0=theirs, mu=np.zeros(6), sigma=np.eye(6))
    status, _, err = run_command(capsys, "evaluate", ours, "--reference", tmp_path / "b.npz", "--features", kind)
    assert status == 2
    assert "statistics of FID's Inception" in err


def test_the_command(tmp_path, capsys, monkeypatch):
    """``flowmo evaluate PICTURES --reference OTHERS``, as lines and as JSON, and what it refuses."""
    monkeypatch.setattr("flowmo.evaluate.metrics.build_features", lambda kind: Colours())
    ours, theirs = as_folder(tmp_path / "a", random_pictures(30)), tmp_path / "b.npz"
    write_npz(theirs, random_pictures(25, 1).split(7), 25)
    status, out, _ = run_command(capsys, "evaluate", ours, "--reference", theirs)
    assert status == 0
    assert out.startswith("30 images against 25\n")
    expected = summary(ours, theirs)
    for name, value in (("Fréchet distance ↓", expected.frechet_distance), ("recall ↑", expected.recall)):
        line = next(line for line in out.splitlines() if line.startswith(name))
        assert float(line.removeprefix(name).split()[0]) == pytest.approx(value, abs=0.01)
    status, out, _ = run_command(capsys, "evaluate", ours, "--reference", theirs, "--json")
    assert status == 0
    assert json.loads(out)["frechet_distance"] == expected.frechet_distance
    for words in (["--reference", theirs], [ours, "--reference", theirs, "--features", "none"]):
        status, _, err = run_command(capsys, "evaluate", *words)
        assert status == 2
        assert "Name both" in err


def test_inception_score_by_its_definition():
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    p = logits.double().softmax(1)
    digest = hashlib.blake2b(b"0/score order", digest_size=8).hexdigest()
    order = torch.randperm(50, generator=torch.Generator().manual_seed(int(digest, 16) >> 1))
    parts = p[order].tensor_split(2)  # of 25, not 20, 20 and 10
    expected = [float((q * (q / q.mean(0)).log()).sum(1).mean().exp()) for q in parts]
    mean, spread = inception_score(logits, split=20)
    assert mean == pytest.approx(np.mean(expected))
    assert spread == pytest.approx(np.std(expected))
    sure = torch.full((7, 7), -1e4).fill_diagonal_(1e4)
    assert inception_score(sure)[0] == pytest.approx(7)


def test_inception_score_does_not_depend_on_the_order_of_files():
    """100 classes, 20 images each, parts of 200: sorted by class a part holds 10 classes and cannot pass 10."""
    sure = 1e4 * torch.nn.functional.one_hot(torch.arange(100)).float()
    by_class = sure.repeat_interleave(20, dim=0)
    p = by_class.double().softmax(1).numpy()

    def score(order):
        parts = [p[order[start : start + 200]] for start in range(0, 2000, 200)]
        return np.mean([np.exp(-(q.mean(0) * np.log(q.mean(0) + (q.mean(0) == 0))).sum()) for q in parts])

    assert score(np.arange(2000)) == pytest.approx(10)
    generator = np.random.default_rng(0)
    in_parts = [score(generator.permutation(2000)) for _ in range(50)]
    for rows in (by_class, sure.repeat(20, 1), by_class.flip(0)):
        found = inception_score(rows, split=200)[0]
        assert abs(found - np.mean(in_parts)) < 5 * np.std(in_parts)
        assert inception_score(rows, split=2000)[0] == pytest.approx(100)
    assert inception_score(by_class, split=200) == inception_score(by_class, split=200), "the shuffle has a seed"


def test_precision_and_recall_on_a_line():
    """Reference at 0, 1, 2, 3; radius to the nearest other is 1."""
    reference = torch.arange(4.0)[:, None]
    generated = torch.tensor([[0.5], [3.9], [4.1], [100.0], [100.5]])
    precision, recall = precision_and_recall(reference, generated, neighbours=1)
    assert precision == pytest.approx(2 / 5)
    # Radii of the generated: 3.4, 0.2, 0.2, 0.5, 0.5.
    assert recall == pytest.approx(4 / 4)
    assert precision_and_recall(reference, generated[1:], neighbours=1)[1] == 0
    with pytest.raises(StatisticsError, match="more than 3 images"):
        precision_and_recall(reference[:3], generated)


def test_equals_torch_fidelity():
    """Distances, precision and recall of the published package, on the same features."""
    if find_spec("torch_fidelity") is None:
        pytest.skip("needs torch-fidelity")
    import_torchvision()
    from torch_fidelity.metric_fid import fid_statistics_to_metric
    from torch_fidelity.metric_kid import mmd2
    from torch_fidelity.metric_prc import prc_features_to_metric

    a, b = (torch.randn(120, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    b = b * 1.3 + 0.2
    statistics = [{"mu": x.double().mean(0).numpy(), "sigma": np.cov(x.double().numpy(), rowvar=False)} for x in (a, b)]

    class Rows:
        name = "rows"

        def __init__(self, rows):
            self.rows = rows

        def __len__(self):
            return len(self.rows)

        def batches(self, size, rank=0, ranks=1):
            yield from enumerate(torch.zeros(len(self.rows), 3, 2, 2, dtype=torch.uint8).split(size))

    seen = []
    for rows in (a, b):
        place = iter(rows.split(8))

        class Given(Colours):
            def forward(self, images, place=place):
                part = next(place)
                return Features(part, torch.zeros(8, 3), torch.zeros(8, 12))

        seen.append(extract_features(Rows(rows), Given(), batch_size=8))
    ours = GenerationSummary.of(*seen, Colours())
    fid = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert ours.frechet_distance == pytest.approx(fid, rel=1e-4)
    x, y = a.double().numpy(), b.double().numpy()
    kernels = [(p @ q.T / 16 + 1) ** 3 for p, q in ((x, x), (x, y), (y, y))]
    assert ours.kernel_distance == pytest.approx(mmd2(*kernels), rel=1e-9)
    options = {"prc_neighborhood": 3, "prc_batch_size": 50, "verbose": False, "save_cpu_ram": True}
    theirs = prc_features_to_metric(a, b, **options)
    assert ours.precision == pytest.approx(theirs["precision"], abs=1e-6)
    assert ours.recall == pytest.approx(theirs["recall"], abs=1e-6)


def test_sets_that_mean_nothing(tmp_path):
    network = Colours()
    one = as_folder(tmp_path / "one", random_pictures(1))
    with pytest.raises(StatisticsError, match=r"1 of 1 images can be read\. A covariance"):
        extract_features(open_image_set(one), network)
    mixed = as_folder(tmp_path / "mixed", random_pictures(2))
    as_folder(mixed / "more", random_pictures(1, size=20))
    few = extract_features(open_image_set(as_folder(tmp_path / "few", random_pictures(3))), network)
    found = GenerationSummary.of(few, few, network)
    assert (found.precision, found.frechet_distance) == (None, pytest.approx(0, abs=1e-6))
    assert "no precision and recall: Precision and recall need more than 3 images a set." in found.missing
    with pytest.raises(DataError, match="of one size"):
        extract_features(open_image_set(mixed), network)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="contains no images"):
        open_image_set(tmp_path / "empty")
    with pytest.raises(DataError, match="of one size"):
        extract_features(open_image_set(PICTURES), network)


def npz_of(path, **members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def test_damaged_and_hostile_npz(tmp_path):
    path = tmp_path / "x.npz"
    good = npy(np.zeros((4, 8, 8, 3), np.uint8))
    path.write_bytes(b"PK no")
    with pytest.raises(DataError, match=r"is not an \.npz file"):
        NpzFile(path)
    with pytest.raises(DataError, match=r"is not an \.npz file"):
        NpzFile(tmp_path / "missing.npz")
    with pytest.raises(DataError, match="not uint8 images"):
        NpzFile(npz_of(path, arr_0=npy(np.zeros((4, 8, 8, 3), np.float32))))
    with pytest.raises(DataError, match="not uint8 images"):
        NpzFile(npz_of(path, arr_0=npy(np.array([{"a": 1}], dtype=object))))  # a pickle, never read
    with pytest.raises(DataError, match="is damaged"):
        NpzFile(npz_of(path, arr_0=good[:20]))
    with pytest.raises(DataError, match="ends within image 3 of 4"):
        list(NpzFile(npz_of(path, arr_0=good[:-10])).batches(2))
    terabyte = npy(np.zeros((1, 8, 8, 3), np.uint8)).replace(b"(1, 8, 8, 3), }    ", b"(99999, 4096, 4096, 3), }", 1)
    file = NpzFile(npz_of(path, arr_0=terabyte)) if b"99999" in terabyte else None
    if file:
        with pytest.raises(DataError, match="ends within image 0"):
            next(file.batches(1))
    with pytest.raises(DataError, match="are not a mean and its covariance"):
        NpzFile(npz_of(path, mu=npy(np.zeros(3)), sigma=npy(np.zeros((2, 2))))).statistics("pooled")
    with pytest.raises(DataError, match="not a mean"):
        NpzFile(npz_of(path, mu=npy(np.zeros((3, 3))), sigma=npy(np.zeros((2, 2))))).statistics("pooled")
    with pytest.raises(DataError, match="neither images nor"):
        extract_features(open_image_set(npz_of(path, other=good)), Colours())
    with pytest.raises(DataError, match="2 images were given, not 3"):
        write_npz(path, [random_pictures(2)], 3)


def test_statistics_count_for_the_reference_alone(tmp_path):
    """A generated set that holds images is compared by its images; without any, its statistics are named."""
    draw = np.random.default_rng(0)
    rows = [Features(torch.from_numpy(draw.normal(size=(60, 4))).float(), None, None) for _ in range(2)]
    other = {"pooled": Gaussian.of(torch.from_numpy(draw.normal(3, 2, (60, 4))))}
    plain = GenerationSummary.of(SetFeatures(rows[0]), SetFeatures(rows[1]), Colours())
    both = GenerationSummary.of(SetFeatures(rows[0], other), SetFeatures(rows[1]), Colours())
    assert both.frechet_distance == plain.frechet_distance
    reference = GenerationSummary.of(SetFeatures(rows[0]), SetFeatures(rows[1], other), Colours())
    assert reference.frechet_distance > 10 * plain.frechet_distance
    alone = GenerationSummary.of(SetFeatures(None, other), SetFeatures(rows[1]), Colours())
    assert any("the generated set has statistics only" in line for line in alone.missing)
    assert not any("no classifier" in line or "reference has" in line for line in alone.missing)


def test_ranks_read_their_own_batches(tmp_path):
    images = torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(10, 3, 4, 4)
    write_npz(tmp_path / "A.NPZ", [images], 10)
    for size, ranks in ((3, 2), (4, 3), (16, 2)):
        parts = [open_image_set(tmp_path / "A.NPZ").batches(size, rank, ranks) for rank in range(ranks)]
        found = dict(pair for part in parts for pair in part)
        assert torch.equal(torch.cat([found[number] for number in sorted(found)]), images)
    for i in range(5):
        Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / f"{i}.png")
    source = open_image_set(tmp_path)
    found = dict(pair for rank in range(2) for pair in source.batches(2, rank, 2))
    assert [int(batch[0, 0, 0, 0]) for _, batch in sorted(found.items())] == [0, 2, 4]


def test_a_grid_without_a_gap():
    assert grid([[torch.zeros(3, 4, 5)] * 2] * 3, gap=0).shape == (3, 12, 10)


def compare_on_a_rank(folder, out):
    """Features of a folder's images, or the error that a rank raises."""
    with join("cpu", group=True) as world:
        try:
            found = extract_features(open_image_set(folder), Colours(), batch_size=2, world=world)
            text = str(found.count)
        except FlowMoError as error:
            text = str(error)
    (out / f"{world.rank}.txt").write_text(text)


@pytest.mark.parametrize("case", ["equal", "sizes", "one"])
def test_two_ranks_share_the_images(case, tmp_path):
    """All images are on rank 0, and both ranks end with the same error."""
    (tmp_path / "images").mkdir()
    for i in range({"one": 1}.get(case, 5)):
        side = 10 if (case, i) == ("sizes", 2) else 8
        Image.new("RGB", (side, side), (i, i, i)).save(tmp_path / "images" / f"{i}.png")
    run_ranks(compare_on_a_rank, tmp_path / "images", tmp_path)
    first, second = ((tmp_path / f"{rank}.txt").read_text() for rank in range(2))
    if case == "equal":
        assert (first, second) == ("5", "0")
    else:
        assert first == second
        assert {"sizes": "size", "one": "1 of 1 images can be read"}[case] in first
