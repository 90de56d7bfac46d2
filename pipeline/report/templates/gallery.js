  const byId = (id) => document.getElementById(id), large = byId("large"), view = large.firstElementChild;
  const pictures = JSON.parse(byId("pictures")?.textContent ?? "{}");
  for (const image of document.querySelectorAll("img[data-src]")) image.src = pictures[image.dataset.src] ?? image.dataset.src;
  const figures = () => [...document.querySelectorAll(".gallery figure")];
  const visible = () => figures().filter((figure) => figure.checkVisibility() && figure.querySelector(".stack"));
  let current = null, scale = 1;
  const zoom = (value) => {
    scale = Math.min(Math.max(value, 1), 8);
    view.style.setProperty("--zoom", scale);
  };
  const enlarge = (figure) => {
    current = figure;
    view.replaceChildren(figure.cloneNode(true));
    zoom(1);
    if (!large.open) large.showModal();
  };
  view.addEventListener("scroll", (event) => { // halves of a comparison move together
    if (event.target === view) return;
    for (const half of view.querySelectorAll(".pair > div")) half.scrollLeft = event.target.scrollLeft;
  }, true);
  const step = (by) => {
    const all = visible();
    if (all.length) enlarge(all[(all.indexOf(current) + by + all.length) % all.length]);
  };
  document.addEventListener("click", (event) => {
    const at = event.target;
    if (at.matches(".close") || at === large) large.close();
    else if (at.matches("[data-step]")) step(+at.dataset.step);
    else if (at.matches("[data-scale]")) zoom(scale * at.dataset.scale);
    else if (at.matches(".gallery .zoom, .gallery .stack img")) enlarge(at.closest("figure"));
  });
  document.addEventListener("keydown", (event) => {
    if (event.target.matches("input[type=search], input[type=number], select") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "h") document.body.classList.toggle("unmasked");
    if (!large.open) return;
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key], times = { "+": 1.5, "-": 1 / 1.5, 0: 1 / scale }[event.key];
    if (by && !event.target.matches("input")) {
      event.preventDefault();
      step(by);
    }
    if (times) zoom(scale * times);
  });
  byId("all")?.addEventListener("input", (event) => {
    for (const slider of document.querySelectorAll("figure input[type=range]")) {
      slider.value = event.target.value;
      slider.dispatchEvent(new Event("input"));
    }
  });
