for (const table of document.querySelectorAll("table.ledger")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const key = (row, at) => {
    const cell = row.cells[at];
    return "v" in cell.dataset ? +cell.dataset.v : cell.textContent;
  };
  heads.forEach((head, at) => {
    const sort = () => {
      const down = head.ariaSort !== "descending";
      const order = (a, b) => typeof a === "number" ? a - b : a.localeCompare(b, undefined, {numeric: true});
      const rows = [...body.rows].sort((a, b) => order(key(a, at), key(b, at)) * (down ? -1 : 1));
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.ariaSort = down ? "descending" : "ascending";
      body.append(...rows);
    };
    head.classList.add("sorts"); head.tabIndex = 0;
    head.addEventListener("click", sort);
    head.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
  });
}

// On paper nothing can be unfolded: everything is open while it is printed.
const opened = [];
addEventListener("beforeprint", () => {
  for (const folded of document.querySelectorAll("details:not([open])")) {
    opened.push(folded);
    folded.open = true;
  }
});
addEventListener("afterprint", () => opened.splice(0).forEach(folded => { folded.open = false; }));
