  const FIRST = 6; // images of a group before "show more"
  const groups = [...document.querySelectorAll(".group")];
  const text = (id) => byId(id)?.value.trim().toLowerCase() ?? "";
  const bounds = () => [...document.querySelectorAll("#filters input[type=range]")].map((range) => [range.id, +range.value]);
  const fits = (figure, status, most) => (!status || figure.dataset.status === status) &&
    most.every(([key, bound]) => bound === 1 || +figure.dataset[key] <= bound); // a failed image has no value
  const compare = (key, way) => (a, b) => {
    const value = (figure) => key === "name" ? figure.dataset.name : key ? +(figure.dataset[key] ?? 2) : +figure.dataset.place;
    return way * (value(a) < value(b) ? -1 : value(a) > value(b) ? 1 : 0);
  };
  const apply = () => {
    const named = text("find"), chosen = byId("class")?.value ?? "", [key, way] = byId("sort").value.split(" ");
    const status = byId("status")?.value ?? "", most = bounds();
    let count = 0;
    for (const group of groups) {
      const title = group.dataset.name.toLowerCase().includes(named);
      const all = [...group.querySelectorAll("figure")].sort(compare(key, +way || 1));
      const found = all.filter((figure) => fits(figure, status, most) && (title || figure.dataset.name.toLowerCase().includes(named)));
      const shown = new Set(group.dataset.all ? found : found.slice(0, FIRST));
      for (const figure of all) figure.hidden = !shown.has(figure);
      group.querySelector(".gallery").append(...all);
      group.hidden = !found.length || (chosen !== "" && group.dataset.name !== chosen);
      if (named || chosen || status) group.open = !group.hidden;
      const more = group.querySelector(".more"), rest = found.length - shown.size;
      more.hidden = !rest;
      more.textContent = `show ${rest} more`;
      count += group.hidden ? 0 : found.length;
    }
    byId("found").value = `${count} of ${figures().length} images`;
  };
  if (groups.length) {
    figures().forEach((figure, place) => { figure.dataset.place = place; });
    byId("filters").addEventListener("input", apply);
    document.addEventListener("click", (event) => {
      if (!event.target.matches(".more")) return;
      event.target.closest(".group").dataset.all = "yes";
      apply();
    });
    apply();
  }
