  for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
    const head = button.closest("th"), heads = [...head.parentNode.children], place = heads.indexOf(head);
    const body = head.closest("table").tBodies[0], down = head.ariaSort !== "descending";
    for (const other of heads) other.removeAttribute("aria-sort");
    head.ariaSort = down ? "descending" : "ascending";
    const value = (row) => {
      const cell = row.children[place], text = (cell.dataset.value ?? cell.textContent).trim();
      if (!head.matches(".n")) return text.toLowerCase();
      const number = parseFloat(text.replaceAll(",", ""));
      return Number.isNaN(number) ? -Infinity : number; // "-": no value
    };
    const order = (a, b) => value(a) < value(b) ? -1 : value(a) > value(b) ? 1 : 0;
    body.append(...[...body.rows].sort((a, b) => down ? order(b, a) : order(a, b)));
  });
