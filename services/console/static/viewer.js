// The image of a case on one canvas: its window, what lies over it, and where the pointer is.
"use strict";
(() => {
  const root = document.getElementById("pixels");
  if (!root) return;
  const part = (name) => root.querySelector(`[data-part="${name}"]`);
  const told = root.dataset;
  const canvas = part("canvas"), paper = canvas.getContext("2d");
  const sheet = document.createElement("canvas"), ink = sheet.getContext("2d");
  const TYPES = { uint8: Uint8Array, int16: Int16Array, uint16: Uint16Array, float32: Float32Array };
  const COLOURS = [[0, 0, 0], [230, 159, 0], [86, 180, 233], [0, 158, 115], [204, 121, 167], [240, 228, 66], [213, 94, 0]];
  const labels = JSON.parse(told.labels);
  const colourOf = (label) => COLOURS[1 + ((label - 1) % (COLOURS.length - 1))];
  const start = () => ({ slice: image.depth >> 1, zoom: 1, x: 0, y: 0, row: -1, column: -1 });
  const shown = { heat: false, mask: false, opacity: 0.5 }, planes = {};
  let view, note = "", image = null, presets = {}, low = 0, high = 1, stale = true, waits = false, quiet = 0;

  async function fetchPlane(name) {
    const answer = await fetch(`${told.home}/${name}`);
    if (answer.redirected) throw new Error("You are not logged in any more. Open the page again.");
    if (!answer.ok) throw new Error(await answer.text());
    const head = (key) => answer.headers.get(key);
    return { shape: head("X-Shape").split(",").map(Number), axes: head("X-Axes"), spacing: head("X-Spacing-Mm").split(",").filter(Boolean).map(Number),
      values: new TYPES[head("X-Type")](await answer.arrayBuffer()) };
  }

  function describe(plane) {
    const deep = plane.axes === "depth,rows,columns";
    const [rows, columns] = deep ? plane.shape.slice(1) : plane.shape;
    return { ...plane, rows, columns, depth: deep ? plane.shape[0] : 1, colour: plane.axes === "rows,columns,colours",
      stretch: plane.spacing.length ? plane.spacing[0] / plane.spacing[1] : 1 };
  }

  function findPresets() {
    const step = Math.max(1, Math.floor(image.values.length / 50000)), at = (share) => sample[Math.round(share * (sample.length - 1))];
    const sample = Float32Array.from({ length: Math.ceil(image.values.length / step) }, (_, n) => image.values[n * step]).sort();
    let least = Infinity, most = -Infinity;
    for (const value of image.values) { least = Math.min(least, value); most = Math.max(most, value); }
    const full = { "full range": [least, most] };
    const seen = told.window ? { "as the network sees it": told.window.split(",").map(Number) } : {};
    if (told.modality === "CT") return { ...seen, "CT lung": [-1350, 150], "CT soft tissue": [-160, 240], ...full };
    return { "1st to 99th percentile": [at(0.01), at(0.99)], "5th to 95th percentile": [at(0.05), at(0.95)], ...seen, ...full };
  }

  // Pixels of the slice with what lies over them, one to one.
  function paint() {
    const { rows, columns, values, colour } = image, size = rows * columns, first = view.slice * size;
    const made = ink.createImageData(columns, rows), data = made.data, scale = 255 / (high - low || 1);
    for (let n = 0, to = 0; n < size; n++, to += 4) {
      if (colour) { data[to] = values[3 * n]; data[to + 1] = values[3 * n + 1]; data[to + 2] = values[3 * n + 2]; }
      else data[to] = data[to + 1] = data[to + 2] = (values[first + n] - low) * scale;
      data[to + 3] = 255;
    }
    if (shown.heat) cover(data, (n) => planes.heat.values[first + n] / 255, () => (colour ? [0, 220, 255] : [255, 120, 0]));
    if (shown.mask) cover(data, (n) => (planes.mask.values[first + n] ? 1 : 0), (n) => colourOf(planes.mask.values[first + n]));
    ink.putImageData(made, 0, 0);
    stale = false;
  }

  function cover(data, share, colour) {
    for (let n = 0, to = 0; to < data.length; n++, to += 4) {
      const part = shown.opacity * share(n), over = part ? colour(n) : [];
      for (let c = 0; part && c < 3; c++) data[to + c] += part * (over[c] - data[to + c]);
    }
  }

  // Where the image lies on the canvas, in its device's pixels.
  function place() {
    const fit = Math.min(canvas.width / image.columns, canvas.height / (image.rows * image.stretch)) * view.zoom;
    const wide = image.columns * fit, tall = image.rows * image.stretch * fit;
    return { fit, tall: fit * image.stretch, left: (canvas.width - wide) / 2 + view.x, top: (canvas.height - tall) / 2 + view.y };
  }

  function draw() {
    waits = false;
    if (stale) paint();
    const { fit, tall, left, top } = place(), dot = devicePixelRatio || 1;
    paper.setTransform(1, 0, 0, 1, 0, 0);
    paper.shadowBlur = 0;
    paper.clearRect(0, 0, canvas.width, canvas.height);
    paper.imageSmoothingEnabled = fit < 3;
    paper.setTransform(fit, 0, 0, tall, left, top);
    paper.drawImage(sheet, 0, 0);
    paper.setTransform(1, 0, 0, 1, 0, 0);
    paper.lineWidth = dot;
    paper.strokeStyle = paper.fillStyle = "#ffd54a";
    [paper.shadowColor, paper.shadowBlur] = ["#000", 4 * dot]; // on white it would not be seen
    paper.font = `${13 * dot}px system-ui, sans-serif`;
    const x = left + (view.column + 0.5) * fit, y = top + (view.row + 0.5) * tall, arm = 9 * dot;
    if (view.row >= 0) line([[x - arm, y, x - arm / 3, y], [x + arm / 3, y, x + arm, y], [x, y - arm, x, y - arm / 3], [x, y + arm / 3, x, y + arm]]);
    const ends = { R: [8 * dot, canvas.height / 2], L: [canvas.width - 16 * dot, canvas.height / 2], A: [canvas.width / 2, 16 * dot], P: [canvas.width / 2, canvas.height - 8 * dot] };
    if (told.axial) for (const [letter, spot] of Object.entries(ends)) paper.fillText(letter, ...spot);
    if (image.spacing.length) rule(fit, dot);
  }

  function line(parts) {
    paper.beginPath();
    for (const [a, b, c, d] of parts) { paper.moveTo(a, b); paper.lineTo(c, d); }
    paper.stroke();
  }

  function rule(fit, dot) {
    const most = (canvas.width / 4 / fit) * image.spacing[1];
    const long = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100].filter((mm) => mm <= most).pop() || most;
    const wide = (long / image.spacing[1]) * fit, x = 14 * dot, y = canvas.height - 14 * dot;
    line([[x, y, x + wide, y], [x, y - 4 * dot, x, y + 4 * dot], [x + wide, y - 4 * dot, x + wide, y + 4 * dot]]);
    paper.fillText(`${+long.toPrecision(2)} mm`, x + wide + 8 * dot, y + 4 * dot);
  }

  function show(painted = true) {
    if (!image) return;
    stale ||= painted;
    if (!waits) requestAnimationFrame(draw);
    waits = true;
    [part("low").value, part("high").value] = [+low.toPrecision(5), +high.toPrecision(5)];
    part("slice").value = view.slice + 1;
    part("place").textContent = `${view.slice + 1} of ${image.depth}`;
    part("preset").value = Object.keys(presets).find((name) => presets[name][0] === low && presets[name][1] === high) || "";
    for (const name of ["heat", "mask"]) part(name).setAttribute("aria-pressed", shown[name]);
    part("legend").hidden = !shown.mask;
    read();
    clearTimeout(quiet); // so that it is not read out at every step
    quiet = setTimeout(() => { part("state").textContent = tell(); }, 250);
  }

  function tell() {
    const size = `${image.rows} rows, ${image.columns} columns${image.depth > 1 ? `, slice ${view.slice + 1} of ${image.depth}` : ""}`;
    const spacing = image.spacing.length ? `pixels of ${image.spacing.map((mm) => +mm.toPrecision(3)).join(" × ")} mm` : "the file tells no spacing";
    const grey = image.colour ? "colours as they are" : `window ${+low.toPrecision(4)} to ${+high.toPrecision(4)} ${unit()}`;
    const over = [shown.heat && "heat map", shown.mask && "outline"].filter(Boolean).join(" and ");
    return `${size}; ${spacing}; ${grey}; zoom ${Math.round(100 * view.zoom)} %${over ? `; ${over} shown` : ""}. ${note}`;
  }

  const unit = () => (told.modality === "CT" ? "HU" : "(arbitrary units)");

  function read() {
    const { row, column } = view, values = image.values, at = (view.slice * image.rows + row) * image.columns + column;
    if (row < 0) return void (part("reading").textContent = "\u00a0");
    const value = image.colour ? `red ${values[3 * at]}, green ${values[3 * at + 1]}, blue ${values[3 * at + 2]}` : `${+values[at].toPrecision(6)} ${unit()}`;
    const heat = shown.heat ? `, heat ${Math.round(planes.heat.values[at] / 2.55)} % of its largest` : "";
    const mask = shown.mask ? `, ${labels[planes.mask.values[at]] || "nothing outlined"}` : "";
    part("reading").textContent = `row ${row}, column ${column}: ${value}${heat}${mask}`;
  }

  const bound = (value, least, most) => Math.min(Math.max(value, least), most);
  const setWindow = (a, b) => { if (Number.isFinite(a) && Number.isFinite(b) && b > a) [low, high] = [a, b]; show(); };
  const setSlice = (number) => { view.slice = bound(number, 0, image.depth - 1); show(); };
  const pan = (x, y) => { view.x += x; view.y += y; show(false); };
  const point = (row, column) => { view.row = bound(row, 0, image.rows - 1); view.column = bound(column, 0, image.columns - 1); show(false); };

  function zoom(factor, x = canvas.width / 2, y = canvas.height / 2) {
    const before = place(), zoomed = bound(view.zoom * factor, 0.2, 60), grown = zoomed / view.zoom;
    view.zoom = zoomed;
    const after = place();
    pan(x - (x - before.left) * grown - after.left, y - (y - before.top) * grown - after.top);
  }

  async function toggle(name) {
    note = name === "heat" ? told.noHeat : told.noMask;
    if (!note && !planes[name]) {
      part("state").textContent = name === "heat" ? "Drawing the heat map…" : "Drawing the outline…";
      await fetchPlane(name).then((plane) => { planes[name] = plane; }, (error) => { note = error.message; });
    }
    if (!note) shown[name] = !shown[name];
    show();
  }

  function reset() {
    [view, note] = [start(), ""];
    Object.assign(shown, { heat: false, mask: false, opacity: part("opacity").defaultValue / 100 });
    part("opacity").value = part("opacity").defaultValue;
    [low, high] = Object.values(presets)[0];
    show();
  }

  const spot = (event) => { const dot = canvas.width / canvas.clientWidth; return [event.offsetX * dot, event.offsetY * dot]; };
  canvas.addEventListener("pointerdown", (event) => canvas.setPointerCapture(event.pointerId));
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  canvas.addEventListener("pointermove", (event) => {
    if (!image) return;
    const [x, y] = spot(event), { left, top, fit, tall } = place(), dot = devicePixelRatio || 1;
    if (event.buttons === 1 && !event.shiftKey) {
      if (image.colour) return;
      const step = (high - low) / 300, wide = Math.max((high - low) + event.movementX * step, 1e-6 * Math.abs(high) || 1e-6);
      const level = (low + high) / 2 - event.movementY * step;
      setWindow(level - wide / 2, level + wide / 2);
    } else if (event.buttons) pan(event.movementX * dot, event.movementY * dot);
    else point(Math.floor((y - top) / tall), Math.floor((x - left) / fit));
  });
  canvas.addEventListener("wheel", (event) => {
    if (!image) return;
    event.preventDefault();
    const turned = event.deltaY || event.deltaX;
    if (event.shiftKey) setSlice(view.slice + Math.sign(turned));
    else zoom(turned < 0 ? 1.15 : 1 / 1.15, ...spot(event));
  }, { passive: false });

  const arrows = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] }, turns = { ArrowUp: 1, ArrowDown: -1, PageUp: 1, PageDown: -1 };
  canvas.addEventListener("keydown", (event) => {
    if (!image) return;
    const [x, y] = arrows[event.key] || [0, 0], far = event.altKey ? 10 : 1, turned = turns[event.key];
    if (event.ctrlKey && (x || y)) point(view.row < 0 ? image.rows >> 1 : view.row + y * far, view.row < 0 ? image.columns >> 1 : view.column + x * far);
    else if (event.shiftKey && (x || y)) pan(-x * 25, -y * 25);
    else if (turned && image.depth > 1) setSlice(view.slice + turned);
    else return;
    event.preventDefault();
  });

  const keys = { h: () => toggle("heat"), m: () => toggle("mask"), 0: reset, "+": () => zoom(1.25), "=": () => zoom(1.25), "-": () => zoom(0.8) };
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest("input:not([type=range]):not([type=checkbox]), select, textarea");
    if (!image || typing || event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]") || !keys[event.key]) return;
    keys[event.key]();
    event.preventDefault();
  });

  const clicks = { in: keys["+"], out: keys["-"], reset, heat: keys.h, mask: keys.m };
  for (const [name, run] of Object.entries(clicks)) part(name).addEventListener("click", run);
  for (const name of ["low", "high"]) part(name).addEventListener("change", () => setWindow(part("low").valueAsNumber, part("high").valueAsNumber));
  part("preset").addEventListener("change", (event) => setWindow(...presets[event.target.value]));
  part("opacity").addEventListener("input", (event) => { shown.opacity = event.target.value / 100; show(); });
  part("slice").addEventListener("input", (event) => setSlice(event.target.value - 1));
  new ResizeObserver(() => {
    const dot = devicePixelRatio || 1;
    [canvas.width, canvas.height] = [canvas.clientWidth, canvas.clientHeight].map((side) => Math.max(1, Math.round(side * dot)));
    show(false);
  }).observe(canvas);

  function begin(plane) {
    image = describe(plane);
    [sheet.width, sheet.height] = [image.columns, image.rows];
    presets = image.colour ? { "as it is": [0, 255] } : findPresets();
    for (const name of Object.keys(presets)) part("preset").add(new Option(name, name));
    part("preset").add(Object.assign(new Option("my own", ""), { hidden: true }));
    for (const one of root.querySelectorAll("[data-grey]")) one.hidden = image.colour;
    part("unit").textContent = unit();
    part("slices").hidden = image.depth === 1;
    part("slice").max = image.depth;
    for (let label = 1; label < labels.length; label++) {
      const swatch = Object.assign(document.createElement("span"), { className: "swatch" });
      swatch.style.background = `rgb(${colourOf(label).join()})`;
      part("legend").append(swatch, labels[label]);
    }
    part("tools").hidden = false;
    reset();
  }

  fetchPlane("pixels").then(begin).catch((error) => { part("state").textContent = `The image cannot be shown. ${error.message}`; });
})();
