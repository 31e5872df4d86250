"""The cache against plain concatenation."""

import torch

from megamf.model.cache import Cache, LayerCache


def piece(time, seed, grad=False):
    return torch.randn(2, 3, time, 4, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


def test_growth_keeps_everything():
    cache = LayerCache()
    pieces = [(piece(t, t), piece(t, 50 + t)) for t in (1, 4, 1, 1, 9, 1)]
    with torch.no_grad():
        for count, (k, v) in enumerate(pieces, start=1):
            keys, values = cache.append(k, v)
            assert torch.equal(keys, torch.cat([k for k, _ in pieces[:count]], dim=2))
            assert torch.equal(values, torch.cat([v for _, v in pieces[:count]], dim=2))
    assert cache.length == 17


def test_shared_keys_and_values_are_stored_once():
    cache = LayerCache()
    with torch.no_grad():
        for t in (2, 1, 1):
            k = piece(t, t)
            keys, values = cache.append(k, k)
            assert keys is values
    assert len(cache._buffers) == 1


def test_crop_keep_and_select():
    with torch.no_grad():
        for change, expected in (
            (lambda c: c.crop(3), slice(0, 3)),
            (lambda c: c.crop(-2), slice(0, 4)),
            (lambda c: c.crop(99), slice(0, 6)),
            (lambda c: c.keep_last(2), slice(4, 6)),
        ):
            cache, k, more = LayerCache(), piece(6, 0), piece(1, 1)
            cache.append(k, k)
            change(cache)
            keys, _ = cache.append(more, more)
            assert torch.equal(keys, torch.cat([k[:, :, expected], more], dim=2))
        cache = LayerCache()
        k, more = piece(3, 0), piece(1, 1)
        cache.append(k, k)
        cache.select(torch.tensor([1, 1]))
        keys, _ = cache.append(more, more)
        assert torch.equal(keys[:, :, :3], k[[1, 1]])


def test_gradient_reaches_the_new_part_only():
    cache = LayerCache()
    first, second = piece(2, 0, grad=True), piece(3, 1, grad=True)
    cache.append(first, first)
    keys, _ = cache.append(second, second)
    keys.sum().backward()
    assert first.grad is None
    assert torch.equal(second.grad, torch.ones_like(second))


def test_appending_never_writes_into_what_a_graph_holds():
    cache = LayerCache()
    scale = torch.ones((), requires_grad=True)
    frozen = piece(2, 0)
    keys, _ = cache.append(frozen, frozen)
    loss = (keys * scale).square().sum()
    cache.crop(1)
    more = piece(1, 1)
    with torch.no_grad():
        cache.append(more, more)
    cache.append(more, more)
    loss.backward()
    assert torch.allclose(scale.grad, 2 * frozen.square().sum())


def test_all_layers_together():
    cache = Cache(2)
    with torch.no_grad():
        for layer in cache.layers:
            layer.append(piece(5, 0), piece(5, 1))
        assert cache.length == 5
        cache.keep_last(3)
        cache.crop(-1)
        assert [layer.length for layer in cache.layers] == [2, 2]
        cache.select(torch.tensor([0]))
        keys, _ = cache.layers[1].append(piece(1, 2)[:1], piece(1, 2)[:1])
    assert keys.shape == (1, 3, 3, 4)
