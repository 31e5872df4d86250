"""Links and groups against times worked out by hand."""

import pytest

from megamf.errors import UserError
from megamf.plan.cluster import OPTIONS, Cluster, Group, all_to_all_seconds, hops, ring_rate


def cluster(nodes=2, gpus_per_node=4, **given):
    values = {"memory": 1000, "peak_flops": 1.0, "intra_node": 100.0, "inter_node": 10.0, "network_efficiency": 1.0}
    return Cluster.of("cpu", nodes, gpus_per_node, **(values | given))


def test_a_group_inside_a_node_uses_the_nodes_links():
    assert ring_rate(Group(4), cluster()) == 100.0
    assert not Group(4).crosses(cluster())


def test_over_nodes_the_members_of_a_node_share_their_network_links():
    # Ranks 0..7: four in each node, so rings use four links of 10.
    assert ring_rate(Group(8), cluster()) == 40.0
    # Ranks 0 and 4: one in each node.
    assert (Group(2, 4).per_node(cluster()), ring_rate(Group(2, 4), cluster())) == (1, 10.0)
    # Ranks 0, 2, 4, 6: two in each node.
    assert ring_rate(Group(4, 2), cluster()) == 20.0
    # More links than the inside of a node carries.
    assert ring_rate(Group(8), cluster(inter_node=90.0)) == 100.0


def test_an_exchange_waits_for_the_slower_kind_of_link():
    # 700 bytes to 7 others, 100 each: 300 inside at 100, 400 outside at 10.
    assert all_to_all_seconds(700, Group(8), cluster()) == pytest.approx(40.0)
    assert all_to_all_seconds(300, Group(4), cluster()) == pytest.approx(3.0)
    assert all_to_all_seconds(300, Group(4), cluster(network_efficiency=0.5)) == pytest.approx(6.0)
    assert all_to_all_seconds(700, Group(1), cluster()) == 0.0


def test_hops_grow_with_the_logarithm():
    assert [hops(Group(size)) for size in (1, 2, 3, 4, 8, 64)] == [0, 1, 2, 2, 3, 6]


def test_every_assumption_is_listed_with_its_unit():
    listed = {option: value for option, value, _, _ in Cluster.of("h100", 8, 8, memory=40 * 2**30).assumptions()}
    assert set(listed) == {option for option, _, _ in OPTIONS.values()}
    assert (listed["--memory-gib"], listed["--intra-node-gbs"], listed["--peak-tflops"]) == (40, 450, 989.4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"nodes": 0}, "--nodes 0"),
        ({"gpus_per_node": -1}, "--gpus-per-node -1"),
        ({"efficiency": 1.5}, "--efficiency 1.5"),
        ({"imbalance": 0.5}, "--imbalance 0.5"),
        ({"inter_node": -1.0}, "--inter-node-gbs -1"),
        ({"peak_flops": None}, "--gpu cpu needs --peak-tflops"),
    ],
)
def test_mistakes_name_the_option(given, message):
    with pytest.raises(UserError, match=message):
        cluster(**given)
