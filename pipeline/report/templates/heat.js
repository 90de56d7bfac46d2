  const matrix = document.getElementById("matrix"), told = document.getElementById("cell");
  if (matrix) {
    const { rows, columns, cells, totals } = JSON.parse(document.getElementById("confusion").textContent);
    const mark = matrix.querySelector("i"), at = [0, 0];
    const tell = (row, column) => {
      at[0] = Math.min(Math.max(row, 0), rows.length - 1);
      at[1] = Math.min(Math.max(column, 0), columns.length - 1);
      const [r, c] = at, count = cells[r][c], share = (100 * count / totals[r]).toPrecision(3);
      mark.hidden = false;
      mark.style.left = `${100 * c / columns.length}%`;
      mark.style.top = `${100 * r / rows.length}%`;
      told.textContent = `${rows[r]} labeled as ${columns[c]}: ${count ? share : 0}% of its pixels (${count.toLocaleString("en")})`;
    };
    matrix.addEventListener("pointermove", (event) => {
      const box = matrix.getBoundingClientRect();
      const part = (from, to, size, count) => Math.floor((from - to) / size * count);
      tell(part(event.clientY, box.top, box.height, rows.length), part(event.clientX, box.left, box.width, columns.length));
    });
    matrix.addEventListener("keydown", (event) => {
      const [down, right] = { ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] }[event.key] ?? [0, 0];
      if (!down && !right) return;
      event.preventDefault();
      tell(at[0] + down, at[1] + right);
    });
  }
