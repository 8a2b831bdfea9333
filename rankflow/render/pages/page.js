// Click a heading to sort its table by that column, once more to turn it round.
for (const table of document.querySelectorAll("table")) {
  table.dataset.sorts = "";
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending" && !head.hasAttribute("data-text");
      const turned = head.getAttribute("aria-sort") === "ascending" && head.hasAttribute("data-text");
      const sign = down || turned ? -1 : 1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign < 0 ? "descending" : "ascending");
      const value = (row) => row.cells[column].dataset.value;
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === "" || y === "") return (x === "") - (y === ""); // nothing goes last, either way
        const order = head.hasAttribute("data-text") ? x.localeCompare(y, "en", { numeric: true }) : x - y;
        return sign * order;
      });
      table.tBodies[0].append(...rows);
    });
  });
}
