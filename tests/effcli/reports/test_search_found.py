"""What a search found, as a page and in a terminal: each choice once, under names that fit it."""

from __future__ import annotations

from pages import checked
from rich.console import Console, RenderableType

from effcli.reports import html_sensitivity
from effcli.reports.sensitivity import LayerCosts, Option, Point, Search, Sensitivity
from effcli.reports.terminal_search import search_table, sensitivity_table


def found() -> Search:
    """Of one group. The second choice of the front is that of ratio 0.5 everywhere, and was chosen."""
    options = tuple(
        Option(value=value, format="f", nbytes=nbytes, output_error=0, cost=cost)
        for value, nbytes, cost in ((0.0, 100, 0.0), (0.5, 50, 3.0))
    )
    group = LayerCosts(name="conv", kind="channels", shape=(5, 5), options=options)
    costs = Sensitivity(
        model="m", step="channels", option="ratio", way="gram", unit="nats", inputs=1, layers=(group,), seconds=0
    )
    front = (point("round 1", 50, 3.0), point("start", 100, 0.0))
    return Search(
        sensitivity=costs,
        budget="50 B",
        front=front,
        along="choices of the rounds",
        uniform=(point("ratio 0.5", 50, 3.0), point("ratio 0.75", 25, 9.0)),
        chosen=point("chosen", 50, 3.0),
        values={"conv": 0.5},
    )


def point(name: str, nbytes: int, cost: float) -> Point:
    return Point(name=name, nbytes=nbytes, average=0, cost=cost)


def printed(table: RenderableType) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_choices_that_agree_are_one_with_all_names() -> None:
    search = found()
    names = [one.name for one in search.choices(search.front)]
    assert names == ["ratio 0.75", "round 1, ratio 0.5, chosen", "start"]
    assert printed(search_table(search)).count("50 B ") == 1


def test_the_page_names_what_is_drawn() -> None:
    page = checked(html_sensitivity.render(found()))
    text = "".join(page.text)
    assert "choices of the rounds" in text and "cheapest choices" not in html_sensitivity.render(found())
    assert "round 1, ratio 0.5, chosen" in text


def test_groups_stand_under_their_own_heading() -> None:
    costs = found().sensitivity
    assert printed(sensitivity_table(costs)).splitlines()[1].split()[0] == "group"
    heads = [head.text for head in checked(html_sensitivity.render(costs)).root.all("th")]
    assert heads[0].startswith("group") and "layer" not in heads
