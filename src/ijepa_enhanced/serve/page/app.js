// The page of `ijepa serve`: sends images to /v1/inspect, and draws what comes back.

const MOST = 8; // images of a request, as in app.py
const LONGEST = 480; // pixels of the longer side of a canvas
const PAUSE = 200; // milliseconds without a change of a slider before a request
// From the least similar patch to the chosen one, as in visualize/features.py.
const RAMP = [[0, 0, 20], [85, 15, 110], [185, 55, 85], [250, 140, 10], [252, 255, 165]];
const MARK = "#00ffff";

const $ = id => document.getElementById(id);
let model = null; // as in /v1/models
let files = [];
let views = []; // one for each image on the page
let asked = null; // the request that is under way
let timer = 0;

// ---- The service

function headers() {
  const token = sessionStorage.getItem("token");
  return token ? {Authorization: `Bearer ${token}`} : {};
}

async function call(path, options = {}) {
  const answer = await fetch(path, {headers: headers(), ...options});
  if (answer.ok) return answer;
  const error = (await answer.json().catch(() => null))?.error ?? {message: `${answer.status} ${answer.statusText}`};
  if (answer.status === 401) {
    $("login").hidden = false;
    $("token").focus();
  }
  throw Object.assign(new Error(error.message), {param: error.param, wait: Number(answer.headers.get("Retry-After"))});
}

async function connect() {
  try {
    model = (await (await call("/v1/models")).json()).data[0];
  } catch (error) {
    $("model").textContent = error.message;
    return;
  }
  $("login").hidden = true;
  const gallery = model.gallery ? ` · gallery of ${model.gallery.toLocaleString("en")} images` : "";
  $("model").textContent = `${model.id} · patches of ${model.patch_size} px · ${model.dimensions} dimensions${gallery}`;
  const slider = $("resolution"), largest = Math.floor(Math.sqrt(model.max_tokens)) * model.patch_size;
  slider.step = model.patch_size;
  slider.min = 2 * model.patch_size;
  slider.max = largest;
  slider.value = Math.min(model.resolution ?? 224, largest);
  showSettings();
  ask();
}

// ---- Requests

function later() {
  showSettings();
  clearTimeout(timer);
  timer = setTimeout(ask, PAUSE);
}

async function ask() {
  asked?.abort();
  clearTimeout(timer);
  if (!model || !files.length) return;
  const own = asked = new AbortController(), body = new FormData();
  for (const file of files) body.append("files", file, file.name);
  body.append("resolution", $("resolution").value);
  body.append("merge_rate", $("rate").value);
  $("state").textContent = "Computing…";
  document.body.setAttribute("aria-busy", "true");
  try {
    const answer = await call("/v1/inspect", {method: "POST", body, signal: own.signal});
    show(await answer.json());
    $("state").textContent = "";
  } catch (error) {
    if (own.signal.aborted) return; // a newer request is under way
    $("state").textContent = "";
    refused(error);
  }
  if (own === asked) document.body.removeAttribute("aria-busy");
}

function refused(error) {
  if (error.wait) {
    $("state").textContent = error.message;
    timer = setTimeout(ask, 1000 * error.wait);
    return;
  }
  const number = /^input\[(\d+)\]/.exec(error.param ?? "")?.[1];
  complain(number ? error.message.replace(`Image ${number}`, files[number].name) : error.message);
  if (number) { // the others may be fine
    files.splice(number, 1);
    views = [];
    ask();
  }
}

function complain(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

function choose(list) {
  const images = [...list];
  if (!images.length) return;
  files = images.slice(0, MOST);
  views = [];
  complain(images.length > MOST ? `Showing the first ${MOST} of ${images.length} images.` : "");
  ask();
}

// ---- Numbers from base64

function bytes(text) {
  return Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
}

function halves(text) { // float16 to float32
  const from = new DataView(bytes(text).buffer), to = new Float32Array(from.byteLength / 2);
  for (let place = 0; place < to.length; place++) {
    const half = from.getUint16(2 * place, true), exponent = half >> 10 & 31, rest = half & 1023;
    const size = exponent ? 2 ** (exponent - 15) * (1 + rest / 1024) : 2 ** -14 * rest / 1024;
    to[place] = half & 0x8000 ? -size : size;
  }
  return to;
}

function words(text) {
  const from = new DataView(bytes(text).buffer);
  return Uint16Array.from({length: from.byteLength / 2}, (_, place) => from.getUint16(2 * place, true));
}

function directions(features, width) { // each patch scaled to length 1
  for (let start = 0; start < features.length; start += width) {
    const vector = features.subarray(start, start + width);
    const norm = Math.sqrt(vector.reduce((sum, value) => sum + value * value, 0)) || 1;
    for (let place = 0; place < width; place++) vector[place] /= norm;
  }
  return features;
}

// ---- The page

function showSettings() {
  $("resolution-text").textContent = `${$("resolution").value} px`;
  $("rate-text").textContent = Number($("rate").value).toFixed(2);
  $("layer-text").textContent = $("layer").disabled ? "" : $("layer").value;
}

async function show(found) {
  const depth = found.images[0].regions.length, slider = $("layer"), last = slider.value === slider.max;
  slider.max = Math.max(1, depth);
  slider.disabled = depth < 2;
  if (last) slider.value = slider.max; // the slider stays at the last layer
  showSettings();
  const old = views;
  views = await Promise.all(found.images.map((image, place) => viewOf(image, found.milliseconds, old[place])));
  $("images").replaceChildren(...views.map(view => view.element));
  if (old.some(view => view.focused)) views[old.findIndex(view => view.focused)]?.seen.focus();
  for (const [place, view] of views.entries()) {
    view.element.querySelector("h2").textContent = files[place].name;
    drawAll(view);
  }
}

async function viewOf(image, shared, old) {
  const [rows, cols] = image.grid, element = $("image").content.cloneNode(true).firstElementChild;
  const picture = new Image();
  picture.src = image.pixels;
  await picture.decode();
  const cell = Math.max(2, Math.round(LONGEST / Math.max(rows, cols)));
  const view = {
    element, picture, rows, cols, cell, tokens: image.tokens,
    seen: element.querySelector(".seen"),
    colors: bytes(image.colors),
    layers: image.regions.map(words),
    features: directions(halves(image.features), model.dimensions),
    row: Math.min(rows - 1, Math.floor(old ? old.row / old.rows * rows : rows / 2)),
    col: Math.min(cols - 1, Math.floor(old ? old.col / old.cols * cols : cols / 2)),
    get focused() { return document.activeElement === this.seen; },
  };
  for (const canvas of element.querySelectorAll("canvas")) {
    canvas.width = cols * cell;
    canvas.height = rows * cell;
    canvas.addEventListener("pointerdown", event => {
      const box = canvas.getBoundingClientRect();
      pick(view, Math.floor((event.clientY - box.top) / box.height * rows),
        Math.floor((event.clientX - box.left) / box.width * cols));
    });
  }
  view.seen.addEventListener("keydown", event => {
    const step = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key];
    if (!step) return;
    event.preventDefault();
    pick(view, view.row + step[0], view.col + step[1]);
  });
  showNumbers(view, image, shared);
  showNeighbors(view, image.neighbors);
  return view;
}

function pick(view, row, col) {
  view.row = Math.max(0, Math.min(view.rows - 1, row));
  view.col = Math.max(0, Math.min(view.cols - 1, col));
  drawAll(view);
}

function make(tag, text = "", name = "") {
  const element = document.createElement(tag);
  element.textContent = text;
  element.className = name;
  return element;
}

function showNumbers(view, image, shared) {
  const list = view.element.querySelector(".layers"), first = image.tokens[0];
  list.replaceChildren(...image.tokens.map((count, layer) => {
    const item = make("li"), bar = make("span", "", "bar");
    bar.style.height = `${100 * count / first}%`;
    item.append(bar);
    item.title = layer ? `layer ${layer}: ${count} tokens` : `${count} patches`;
    return item;
  }));
  const end = image.tokens.at(-1);
  const text = end < first ? `${first} patches, ${end} tokens at the end` : `${first} patches, nothing merges`;
  list.after(make("p", text, "soft"));
  const {images, tokens} = image.pack, times = {
    "decode and resize": image.milliseconds.decode,
    "wait for the encoder": image.milliseconds.wait,
    [images > 1 ? `encode ${images} images together, ${tokens} patches` : "encode"]: image.milliseconds.encode,
    "colors": shared.colors,
    ...(model.gallery ? {"search the gallery": shared.neighbors} : {}),
  };
  view.element.querySelector(".times").replaceChildren(
    ...Object.entries(times).flatMap(([name, value]) => [make("dt", name), make("dd", value.toFixed(1))]));
}

function showNeighbors(view, neighbors) {
  view.element.querySelector(".gallery").hidden = !neighbors.length;
  view.element.querySelector(".neighbors").replaceChildren(...neighbors.map(near => {
    const item = make("li"), picture = new Image(), name = near.label ? `${near.key} (${near.label})` : near.key;
    picture.alt = name;
    call(`/v1/gallery/${near.row}`).then(answer => answer.blob()).then(blob => {
      picture.src = URL.createObjectURL(blob);
      picture.onload = () => URL.revokeObjectURL(picture.src);
    }, () => item.classList.add("missing")); // its file is gone
    item.append(picture, make("span", near.score.toFixed(3), "score"), make("span", name, "name"));
    item.title = name;
    return item;
  }));
}

// ---- Drawing

function drawAll(view) {
  const draw = (name, paint) => {
    const canvas = view.element.querySelector(`.${name}`), context = canvas.getContext("2d");
    paint(context);
    outline(context, view);
    return canvas;
  };
  const place = `row ${view.row + 1} of ${view.rows}, column ${view.col + 1} of ${view.cols}`;
  draw("seen", context => context.drawImage(view.picture, 0, 0, context.canvas.width, context.canvas.height))
    .setAttribute("aria-label", `Patch ${place}. Arrow keys choose another one.`);
  draw("colors", context => cells(context, view, patch => view.colors.subarray(3 * patch, 3 * patch + 3)))
    .setAttribute("aria-label", `Feature map of ${view.rows} by ${view.cols} patches`);
  const layer = Math.min($("layer").value, view.layers.length) - 1;
  draw("regions", context => regions(context, view, view.layers[layer]))
    .setAttribute("aria-label", "Regions of patches that share a token");
  view.element.querySelector(".count").textContent =
    view.layers.length ? `${view.tokens[layer + 1]} tokens after layer ${layer + 1}` : "none: the merge rate is 0";
  const values = similarity(view), low = Math.min(...values);
  draw("similar", context => cells(context, view, patch => ramp((values[patch] - low) / Math.max(1 - low, 1e-6))))
    .setAttribute("aria-label", `Similarity of all patches to the one in ${place}`);
  view.element.querySelector(".low").textContent = low.toFixed(2);
  view.element.querySelector(".chosen").textContent = `to the patch in ${place}`;
}

function similarity(view) {
  const width = model.dimensions, chosen = view.row * view.cols + view.col;
  const wanted = view.features.subarray(chosen * width, (chosen + 1) * width);
  return Float32Array.from({length: view.rows * view.cols}, (_, patch) => {
    let sum = 0;
    for (let place = 0; place < width; place++) sum += wanted[place] * view.features[patch * width + place];
    return sum;
  });
}

function ramp(share) {
  const place = Math.max(0, Math.min(1, share)) * (RAMP.length - 1), below = Math.min(RAMP.length - 2, Math.floor(place));
  return RAMP[below].map((value, channel) => value + (place - below) * (RAMP[below + 1][channel] - value));
}

function cells(context, {rows, cols, cell}, color) {
  for (let patch = 0; patch < rows * cols; patch++) {
    const [red, green, blue] = color(patch);
    context.fillStyle = `rgb(${red} ${green} ${blue})`;
    context.fillRect(patch % cols * cell, Math.floor(patch / cols) * cell, cell, cell);
  }
}

function regions(context, view, holders) {
  const {rows, cols, cell, picture} = view;
  const small = new OffscreenCanvas(cols, rows).getContext("2d", {willReadFrequently: true});
  small.imageSmoothingQuality = "high";
  small.drawImage(picture, 0, 0, cols, rows);
  const pixels = small.getImageData(0, 0, cols, rows).data;
  const own = holders ?? Uint16Array.from({length: rows * cols}, (_, patch) => patch), sums = new Map();
  own.forEach((token, patch) => {
    const sum = sums.get(token) ?? sums.set(token, [0, 0, 0, 0]).get(token);
    for (let channel = 0; channel < 3; channel++) sum[channel] += pixels[4 * patch + channel];
    sum[3] += 1;
  });
  const mean = patch => sums.get(own[patch]).slice(0, 3).map(value => value / sums.get(own[patch])[3]);
  cells(context, view, mean);
  if (!holders) return;
  for (let patch = 0; patch < own.length; patch++) {
    const row = Math.floor(patch / cols), col = patch % cols;
    context.fillStyle = mean(patch).reduce((sum, value) => sum + value) < 384 ? "#fff" : "#000";
    const edge = (down, right, x, y, width, height) => {
      const other = row + down < 0 || row + down >= rows || col + right < 0 || col + right >= cols
        ? -1 : own[patch + down * cols + right];
      if (other !== own[patch]) context.fillRect(col * cell + x, row * cell + y, width, height);
    };
    edge(-1, 0, 0, 0, cell, 1);
    edge(1, 0, 0, cell - 1, cell, 1);
    edge(0, -1, 0, 0, 1, cell);
    edge(0, 1, cell - 1, 0, 1, cell);
  }
}

function outline(context, {row, col, cell}) {
  context.strokeStyle = MARK;
  context.lineWidth = Math.max(2, cell / 8);
  context.strokeRect(col * cell + 1, row * cell + 1, cell - 2, cell - 2);
}

// ---- Events

$("files").addEventListener("change", event => choose(event.target.files));
addEventListener("dragover", event => { event.preventDefault(); document.body.classList.add("dragging"); });
addEventListener("dragleave", event => { if (!event.relatedTarget) document.body.classList.remove("dragging"); });
addEventListener("drop", event => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  choose(event.dataTransfer.files);
});
$("resolution").addEventListener("input", later);
$("rate").addEventListener("input", later);
$("layer").addEventListener("input", () => { showSettings(); views.forEach(drawAll); });
$("login").addEventListener("submit", event => {
  event.preventDefault();
  sessionStorage.setItem("token", $("token").value);
  connect();
});
connect();
