"use strict";
const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const items = data.images;
const lastBlock = data.colors.length - 1;
const palette = data.colors.map((color) => [1, 3, 5].map((at) => parseInt(color.slice(at, at + 2), 16)));
let shown = items; // matching items in the order of the grid
let block = Math.ceil(lastBlock / 2);
let opened = null; // the item shown enlarged
let layersOfOpened = null; // its layers, or a promise of them
let timer = null; // set while playing
let descending = false;

// Text and numbers ----------------------------------------------------------------------------------

const fold = (text) => text.normalize("NFKC").toLowerCase();
const rounded = new Intl.NumberFormat("en", { style: "percent", roundingMode: "halfEven" }); // rounds as Python does
const thousands = (count) => count.toLocaleString("en");
const radio = (view) => document.querySelector(`input[name=view][value=${view}]`);
const chosenView = () => document.querySelector("input[name=view]:checked").value;

function liveShare(some) {
  let [live, patches] = [0, 0];
  for (const item of some) {
    for (const depth of item.depth) live += depth >= block;
    patches += item.depth.length;
  }
  return live / Math.max(patches, 1);
}

// Items and their cards -----------------------------------------------------------------------------

function prepare() {
  const classes = [...new Set(items.map((item) => item.class))].filter((name) => name !== null);
  classes.sort(new Intl.Collator("en", { numeric: true }).compare);
  const rank = new Map(classes.map((name, place) => [name, place]));
  items.sort((a, b) => a.index - b.index);
  items.forEach((item, place) => {
    item.place = place;
    item.class_rank = rank.get(item.class) ?? null;
    item.words = fold(item.words.join("\n"));
    item.card = makeCard(item);
  });
}

function makeCard(item) {
  const card = $("card").content.firstElementChild.cloneNode(true);
  const put = (selector, text) => { card.querySelector(selector).textContent = text; };
  const canvas = card.querySelector("canvas");
  canvas.style.aspectRatio = `${item.width} / ${item.height}`;
  canvas.classList.toggle("small", Math.max(item.width, item.height) <= 96); // scaled up on the page
  card.classList.toggle("wrong", item.wrong);
  card.title = item.figures.map((pair) => pair.join(": ")).join("\n");
  card.item = item;
  put(".name", item.title);
  put(".mark", item.mark);
  card.querySelector(".mark").ariaLabel = item.wrong ? "wrong:" : null;
  card.querySelector(".mark").ariaHidden = item.wrong ? null : "true";
  put(".words", item.verdict);
  put(".sure", item.sure);
  put(".figures", `depth ${item.mean_depth.toFixed(1)} ± ${item.spread.toFixed(1)}`);
  return card;
}

// Drawing -------------------------------------------------------------------------------------------

// The canvases stay on the CPU, because they are small and their pixels are read back.
function sheet(width, height) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [width, height];
  return canvas.getContext("2d", { willReadFrequently: true });
}

// Load the layers of an item: the image, the image in gray, and the depth map with one pixel per patch.
async function load(item) {
  const picture = new Image();
  picture.src = item.image;
  await picture.decode();
  return { picture, gray: grayOf(picture), map: mapOf(item) };
}

function grayOf(picture) {
  const context = sheet(picture.naturalWidth, picture.naturalHeight);
  context.drawImage(picture, 0, 0);
  const image = context.getImageData(0, 0, context.canvas.width, context.canvas.height);
  for (let i = 0, rgba = image.data; i < rgba.length; i += 4) {
    rgba[i] = rgba[i + 1] = rgba[i + 2] = (rgba[i] * 299 + rgba[i + 1] * 587 + rgba[i + 2] * 114) / 1000;
  }
  context.putImageData(image, 0, 0);
  return context.canvas;
}

function mapOf(item) {
  const context = sheet(item.columns, item.depth.length / item.columns);
  const image = context.createImageData(context.canvas.width, context.canvas.height);
  item.depth.forEach((depth, patch) => image.data.set([...palette[depth], 255], patch * 4));
  context.putImageData(image, 0, 0);
  return context.canvas;
}

function draw(canvas, item, { picture, gray, map }, view) {
  const [width, height] = [picture.naturalWidth, picture.naturalHeight];
  if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(view === "overlay" ? gray : picture, 0, 0);
  if (view === "live") fadeHalted(context, item, gray);
  if (view !== "depth" && view !== "overlay") return;
  context.globalAlpha = view === "overlay" ? data.overlay : 1;
  context.imageSmoothingEnabled = false;
  context.drawImage(map, 0, 0, width, height);
  context.globalAlpha = 1;
}

// Draw halted patches in gray with an eighth of their contrast, close to the color of the page.
function fadeHalted(context, item, gray) {
  const rest = (data.halted * 8) / 7;
  const veil = isDark() ? 255 - rest : rest;
  context.save();
  context.clip(haltedPatches(item, gray.width, gray.height));
  context.drawImage(gray, 0, 0);
  context.globalAlpha = 7 / 8;
  context.fillStyle = `rgb(${veil} ${veil} ${veil})`;
  context.fillRect(0, 0, gray.width, gray.height);
  context.restore();
}

function haltedPatches(item, width, height) {
  const path = new Path2D();
  const [wide, high] = [width / item.columns, (height * item.columns) / item.depth.length];
  item.depth.forEach((depth, patch) => {
    if (depth >= block) return;
    const [column, row] = [patch % item.columns, Math.floor(patch / item.columns)];
    const [left, top] = [Math.round(column * wide), Math.round(row * high)];
    path.rect(left, top, Math.round((column + 1) * wide) - left, Math.round((row + 1) * high) - top);
  });
  return path;
}

// Only cards near the viewport keep their layers in memory.
const near = new Map();
const observer = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) (isIntersecting ? arrive : leave)(target);
}, { rootMargin: "300px" });

async function arrive(card) {
  near.set(card, null);
  const layers = await load(card.item);
  if (!near.has(card)) return; // the card left the viewport while its layers were loading
  near.set(card, layers);
  drawCard(card, layers);
}

function leave(card) {
  near.delete(card);
  const canvas = card.querySelector("canvas");
  canvas.width = canvas.height = 0;
}

function drawCard(card, layers) {
  if (layers) draw(card.querySelector("canvas"), card.item, layers, chosenView());
}

let due = false;
function redraw() {
  if (due) return;
  due = true;
  requestAnimationFrame(() => {
    due = false;
    near.forEach((layers, card) => drawCard(card, layers));
    if (opened) drawOpened();
  });
}

// Search, filter and sort ---------------------------------------------------------------------------

function arrange() {
  const words = fold($("search").value).split(/\s+/);
  const matches = (item) => (!$("wrong")?.checked || item.wrong) && words.every((word) => item.words.includes(word));
  const [key, sign] = [$("sort").value, descending ? -1 : 1];
  // Unknown values come last in both directions. Equal values keep the order of the dataset.
  const compare = ({ [key]: a, place: p }, { [key]: b, place: q }) =>
    (a === null) - (b === null) || (a === null ? 0 : sign * (a - b)) || p - q;
  shown = items.filter(matches).sort(compare);
  $("grid").replaceChildren(...shown.map((item) => item.card));
  $("count").textContent = `${thousands(shown.length)} of ${thousands(items.length)} images`;
  $("nothing").hidden = shown.length > 0;
  showBlock();
}

function turnAround() {
  descending = !descending;
  const [arrow, word] = $("direction").children;
  [arrow.textContent, word.textContent] = descending ? ["↓", "descending"] : ["↑", "ascending"];
  $("direction").ariaLabel = descending ? "Descending; switch to ascending" : "Ascending; switch to descending";
  arrange();
}

function showAll() {
  $("search").value = "";
  if ($("wrong")) $("wrong").checked = false;
  arrange();
  $("search").focus();
}

// Blocks --------------------------------------------------------------------------------------------

const sliders = [$("blocks"), $("one-blocks")];

function setBlock(value) {
  block = Math.min(Math.max(value, 1), lastBlock);
  if (!opened) radio("live").checked = true;
  showBlock();
}

function showBlock() {
  for (const slider of sliders) {
    const some = slider === $("blocks") ? shown : opened ? [opened] : [];
    const text = `block ${block}: ${rounded.format(liveShare(some))} live`;
    const input = slider.querySelector("input");
    input.value = block;
    input.setAttribute("aria-valuetext", text);
    slider.querySelector("output").textContent = text;
    slider.querySelectorAll("li").forEach((tick, place) => tick.classList.toggle("now", place + 1 === block));
  }
  $("blocks").classList.toggle("colored", ["depth", "overlay"].includes(chosenView()));
  redraw();
}

function play() {
  setBlock((block % lastBlock) + 1);
  timer = setTimeout(play, data.frame_seconds * (block === lastBlock ? 4000 : 1000));
  showPlaying();
}

function pause() {
  clearTimeout(timer);
  timer = null;
  showPlaying();
}

function showPlaying() {
  for (const slider of sliders) {
    slider.classList.toggle("playing", timer !== null);
    slider.querySelector(".play").ariaLabel = timer === null ? "Play the blocks" : "Pause";
  }
}

const playOrPause = () => (timer === null ? play : pause)();

function stepBlock(by) {
  pause();
  setBlock(block + by);
}

// Enlarged image ------------------------------------------------------------------------------------

function enlarge(item) {
  opened = item;
  layersOfOpened = near.get(item.card) ?? load(item);
  const place = shown.indexOf(item) + 1;
  $("one-name").textContent = item.title;
  $("one-place").textContent = `${thousands(place)} of ${thousands(shown.length)}`;
  $("one-figures").replaceChildren(...item.figures.map(figure));
  if (item.wrong) $("one-figures").querySelectorAll("dd")[1].className = "wrong";
  if (!$("one").open) {
    $("one").showModal();
    $("one").focus();
  }
  showBlock();
}

function figure([name, value]) {
  const pair = document.createElement("div");
  pair.append(document.createElement("dt"), document.createElement("dd"));
  [pair.firstChild.textContent, pair.lastChild.textContent] = [name, value];
  return pair;
}

async function drawOpened() {
  const item = opened;
  const layers = await layersOfOpened;
  if (opened !== item) return; // another image was opened while the layers were loading
  const titles = {
    image: "image",
    depth: `depth, mean ${item.mean_depth.toFixed(1)}`,
    live: `live in block ${block}`,
  };
  for (const canvas of $("one").querySelectorAll("canvas")) {
    const view = canvas.dataset.view;
    canvas.style.aspectRatio = `${item.width} / ${item.height}`;
    canvas.ariaLabel = canvas.nextElementSibling.textContent = titles[view];
    draw(canvas, item, layers, view);
  }
}

function turn(by) {
  enlarge(shown[(shown.indexOf(opened) + by + shown.length) % shown.length]);
}

function closed() {
  const card = opened.card;
  opened = layersOfOpened = null;
  showBlock();
  card.querySelector("button").focus();
}

// Keys ----------------------------------------------------------------------------------------------

const isTyping = (target) => target.matches("input[type=search], select");

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || isTyping(event.target) || $("help").open) return;
  const keys = { "[": () => stepBlock(-1), "]": () => stepBlock(1), p: playOrPause };
  const outside = { "/": () => $("search").focus(), "?": () => $("help").showModal(), ...moves(event.target) };
  const inside = { ArrowUp: () => stepBlock(1), ArrowDown: () => stepBlock(-1), ...turns(event.target) };
  const act = { ...keys, ...(opened ? inside : outside) }[event.key];
  if (!act) return;
  event.preventDefault();
  act();
}

// In the slider, the left and right arrows keep their default action.
const turns = (target) => (target.matches("input") ? {} : { ArrowLeft: () => turn(-1), ArrowRight: () => turn(1) });

function moves(target) {
  if (!target.matches(".card")) return {};
  const place = shown.indexOf(target.parentNode.item);
  const columns = getComputedStyle($("grid")).gridTemplateColumns.split(" ").length;
  const to = (next) => () => shown[next]?.card.querySelector("button").focus();
  return {
    ArrowLeft: to(place - 1), ArrowRight: to(place + 1), ArrowUp: to(place - columns), ArrowDown: to(place + columns),
    Home: to(0), End: to(shown.length - 1),
  };
}

// Events --------------------------------------------------------------------------------------------

function listen() {
  document.addEventListener("keydown", onKey);
  document.addEventListener("themechange", redraw);
  document.querySelector(".find").addEventListener("submit", (event) => event.preventDefault());
  $("search").addEventListener("input", arrange);
  $("sort").addEventListener("change", arrange);
  $("wrong")?.addEventListener("change", arrange);
  $("clear").addEventListener("click", showAll);
  $("direction").addEventListener("click", turnAround);
  document.querySelector(".views").addEventListener("change", () => {
    pause();
    showBlock();
  });
  for (const slider of sliders) {
    slider.querySelector(".play").addEventListener("click", playOrPause);
    slider.querySelector("input").addEventListener("input", (event) => {
      pause();
      setBlock(event.target.valueAsNumber);
    });
  }
  $("grid").addEventListener("click", (event) => {
    const card = event.target.closest("li");
    if (card) enlarge(card.item);
  });
  $("previous").addEventListener("click", () => turn(-1));
  $("next").addEventListener("click", () => turn(1));
  $("close").addEventListener("click", () => $("one").close());
  $("one").addEventListener("close", closed);
  $("ask").addEventListener("click", () => $("help").showModal());
  for (const dialog of [$("one"), $("help")]) {
    dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); }); // a click on the backdrop
  }
}

prepare();
items.forEach((item) => observer.observe(item.card));
listen();
arrange();
