// The page's switches and live parts. No library, no network: everything that is computed is computed here, from the
// numbers in #data. The functions on `minipeft` are ports of the Python ones they are named after; tests compare them.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;
const $ = (selector, within = document) => within.querySelector(selector);
const $$ = (selector, within = document) => [...within.querySelectorAll(selector)];
const say = (en, zh) => (root.dataset.lang === "zh" ? zh : en);
const listeners = []; // drawn again when language or theme changes

// --- language and theme: from the address, what was chosen before, the reader's system ------------------------------

const kept = {
  get(name) { try { return localStorage.getItem("minipeft-" + name); } catch { return null; } },
  set(name, value) { try { localStorage.setItem("minipeft-" + name, value); } catch { /* private windows refuse */ } },
};

function setLanguage(lang) {
  root.dataset.lang = lang;
  root.lang = lang === "zh" ? "zh-CN" : "en";
  $("#language").textContent = lang === "zh" ? "English" : "中文";
  document.title = say("The document, checked — minipeft", "逐条检验 — minipeft");
  for (const option of $$("option[data-en]")) option.textContent = say(option.dataset.en, option.dataset.zh);
  showTheme();
  listeners.forEach((draw) => draw());
}

function showTheme() {
  const theme = root.dataset.theme || "auto";
  const names = { auto: say("auto", "自动"), light: say("light", "浅色"), dark: say("dark", "深色") };
  $("#theme").textContent = "◐ " + names[theme];
  $("#theme").setAttribute("aria-label", say("Theme: ", "主题：") + names[theme]);
}

$("#language").addEventListener("click", () => {
  const lang = root.dataset.lang === "zh" ? "en" : "zh";
  kept.set("lang", lang);
  setLanguage(lang);
});
$("#theme").addEventListener("click", () => {
  const next = { auto: "dark", dark: "light", light: "auto" }[root.dataset.theme || "auto"];
  if (next === "auto") delete root.dataset.theme; else root.dataset.theme = next;
  kept.set("theme", next);
  showTheme();
  listeners.forEach((draw) => draw());
});

// --- the tally filters the claims -----------------------------------------------------------------------------------

for (const button of $$(".tally button")) {
  button.addEventListener("click", () => {
    const on = button.getAttribute("aria-pressed") !== "true";
    $$(".tally button").forEach((other) => other.setAttribute("aria-pressed", other === button && on));
    for (const claim of $$(".claim")) claim.hidden = on && claim.dataset.verdict !== button.dataset.verdict;
  });
}

if ("IntersectionObserver" in window) {
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const link = $(`.bar nav a[href="#${entry.target.id}"]`);
      if (link) entry.isIntersecting ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current");
    }
  }, { rootMargin: "-20% 0px -70% 0px" });
  $$("section[id]").forEach((section) => seen.observe(section));
}

// --- formulas -------------------------------------------------------------------------------------------------------

const minipeft = {
  /** Σ_{i<r} Sᵢ uᵢ vᵢᵀ as a flat array, rows after each other. */
  bestRankR({ U, S, Vt }, r) {
    const out = new Float64Array(U.length * Vt[0].length);
    for (let i = 0; i < r; i++)
      for (let row = 0; row < U.length; row++)
        for (let col = 0; col < Vt[i].length; col++) out[row * Vt[i].length + col] += U[row][i] * S[i] * Vt[i][col];
    return out;
  },

  /** Σ_{i≤r} xᵢ² / Σ xᵢ². */
  energy(values, r) {
    const squares = values.map((x) => x * x), sum = (list) => list.reduce((a, b) => a + b, 0);
    return sum(squares.slice(0, r)) / sum(squares);
  },

  /** The numbers of a code: "nf2" … "nf8", "fp4", "int2" … "int8". */
  codeTable(name) {
    if (data.codes[name]) return data.codes[name];
    const levels = 2 ** (Number(name.slice(3)) - 1) - 1;
    return Array.from({ length: 2 * levels + 1 }, (_, i) => (i - levels) / levels);
  },

  /** Blockwise: each block divided by its largest magnitude, rounded to the nearest number of the table, and back. */
  quantize(values, table, blocksize) {
    const back = new Float64Array(values.length), bounds = table.slice(1).map((x, i) => (x + table[i]) / 2);
    for (let start = 0; start < values.length; start += blocksize) {
      const block = values.slice(start, start + blocksize);
      const absmax = block.reduce((most, x) => Math.max(most, Math.abs(x)), 0);
      block.forEach((x, i) => {
        let code = 0, high = bounds.length; // the first bound that is not below
        for (const scaled = absmax ? x / absmax : 0; code < high;) {
          const middle = (code + high) >> 1;
          if (bounds[middle] < scaled) code = middle + 1; else high = middle;
        }
        back[start + i] = table[code] * absmax;
      });
    }
    return back;
  },

  /** b(t) of AdaLoRA: warm-up, a cubic down to the target, settled ranks. Rounded down. */
  rankBudget(step, { total_step, tinit, tfinal, init_budget, target_budget }) {
    if (step <= tinit) return init_budget;
    if (step > total_step - tfinal) return target_budget;
    const left = 1 - (step - tinit) / (total_step - tfinal - tinit);
    return Math.floor((init_budget - target_budget) * left ** 3 + target_budget);
  },

  /** (out, in) of the seven matrices in a block. */
  matrices(shape) {
    const { hidden_size: d, intermediate_size: f } = shape, head = shape.head_dim || Math.floor(d / shape.num_attention_heads);
    const q = shape.num_attention_heads * head, kv = shape.num_key_value_heads * head;
    return { q_proj: [q, d], k_proj: [kv, d], v_proj: [kv, d], o_proj: [d, q], gate_proj: [f, d], up_proj: [f, d], down_proj: [d, f] };
  },

  parameters(shape) {
    const d = shape.hidden_size;
    const block = Object.values(this.matrices(shape)).reduce((sum, [out, inner]) => sum + out * inner, 2 * d);
    return (2 - shape.tie_word_embeddings) * shape.vocab_size * d + shape.num_hidden_layers * block + d;
  },

  /** The model of that size; for a number without a name Llama's proportions, the nearest multiple of 128. */
  llamaShape(size) {
    if (data.sizes[size]) return data.sizes[size];
    let best = null;
    for (let d = 128; d < Math.round((16 * size) ** (1 / 3)) + 256; d += 128) {
      const shape = {
        hidden_size: d, intermediate_size: 256 * Math.ceil((8 * d) / 3 / 256), num_hidden_layers: d / 128,
        num_attention_heads: d / 128, num_key_value_heads: d / 128, vocab_size: 32000, tie_word_embeddings: false, head_dim: null,
      };
      const off = Math.abs(this.parameters(shape) - size);
      if (!best || off < best.off) best = { shape, off };
    }
    return best.shape;
  },

  /** Bytes of n weights in NF4 with double quantization. */
  nf4Bytes(n) {
    const blocks = Math.ceil(n / 64);
    return Math.ceil(n / 2) + blocks + 4 * Math.ceil(blocks / 256) + 4;
  },

  /** Elements that a block keeps for backward, all linear layers adapted (r > 0) or trained (r = 0). */
  blockActivations(shape, r, batch, seq, live) {
    const n = batch * seq, d = shape.hidden_size, f = shape.intermediate_size, all = this.matrices(shape);
    const q = all.q_proj[0], kv = all.k_proj[0];
    return live * (n * d + n) + n * d + n * (q + 2 * kv) + batch * shape.num_attention_heads * seq * seq + n * q +
      (n * d + n) + n * d + 2 * n * f + n * f + 7 * n * r;
  },

  llamaActivations(shape, r, batch, seq, checkpointing, bytes) {
    const n = batch * seq, d = shape.hidden_size, full = r === 0 ? 1 : 0, layers = shape.num_hidden_layers;
    const blocks = Array.from({ length: layers }, (_, i) => this.blockActivations(shape, r, batch, seq, full || i > 0 ? 1 : 0));
    const inside = checkpointing ? layers * n * d + Math.max(...blocks) : blocks.reduce((a, b) => a + b, 0);
    const tables = seq * Math.floor(this.matrices(shape).q_proj[0] / shape.num_attention_heads);
    return (inside + tables + n * d + n + n * d + full * shape.vocab_size * d) * bytes + full * 8 * n;
  },

  /** The parts of a training step's memory in bytes: `minipeft.measure.estimate_memory` with all linear layers. */
  estimateMemory(size, method, { r = 8, batch = 1, seq = 512, dtype_bytes = 4, optimizer = "adamw", checkpointing = false } = {}) {
    const shape = this.llamaShape(size), layers = shape.num_hidden_layers, pairs = Object.values(this.matrices(shape));
    const total = this.parameters(shape), adapters = layers * r * pairs.reduce((sum, [out, inner]) => sum + out + inner, 0);
    const trained = method === "full" ? total : adapters, states = { sgd: 0, momentum: 1, adamw: 2 }[optimizer];
    const sizes = method === "qlora" ? pairs.map(([out, inner]) => out * inner) : [];
    const frozen = method === "full" ? 0 : total - layers * sizes.reduce((a, b) => a + b, 0);
    return {
      weights: (frozen + trained) * dtype_bytes + layers * sizes.reduce((sum, n) => sum + this.nf4Bytes(n), 0),
      gradients: trained * dtype_bytes,
      optimizer: states * trained * dtype_bytes,
      activations: this.llamaActivations(shape, method === "full" ? 0 : r, batch, seq, checkpointing, dtype_bytes),
    };
  },

  /** n numbers from N(0, 1), the same each time: mulberry32 and Box–Muller. */
  normalSample(n, seed = 1) {
    const uniform = () => {
      seed = (seed + 0x6d2b79f5) | 0;
      let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
      t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
      return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
    };
    return Array.from({ length: n }, () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform()));
  },
};
window.minipeft = minipeft;

// --- drawing --------------------------------------------------------------------------------------------------------

const escaped = (text) => String(text).replace(/[&<>]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[c]);

/** A matrix on a canvas: orange for negative, purple for positive; or grey levels of a digit, dark for ink. */
function picture(canvas, values, [rows, columns], limit, grey) {
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext("2d"), pixels = context.createImageData(columns, rows);
  values.forEach((value, i) => {
    const x = Math.max(-1, Math.min(1, value / limit)), far = Math.abs(x);
    const ends = grey ? [29, 27, 24] : x < 0 ? [179, 88, 6] : [84, 39, 136];
    const strength = grey ? Math.max(0, x) : far;
    ends.forEach((end, channel) => { pixels.data[4 * i + channel] = 250 + (end - 250) * strength; });
    pixels.data[4 * i + 3] = 255;
  });
  context.putImageData(pixels, 0, 0);
}

/** A plot with axes, drawn in the pixels that it has, so that its type is as large as the text's; x, y: [from, to]. */
function frame(svg, { x, y, xTicks, yTicks, xLabel, yLabel, body }) {
  const width = Math.max(260, svg.clientWidth || 640), height = Math.round(Math.min(300, 150 + width / 5));
  const left = yTicks.length ? 44 : 24, bottom = 42;
  const X = (v) => left + ((v - x[0]) / (x[1] - x[0])) * (width - left - 26);
  const Y = (v) => height - bottom - ((v - y[0]) / (y[1] - y[0])) * (height - bottom - 22);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const ticks = xTicks.map((v) => `<text x="${X(v)}" y="${height - bottom + 17}" text-anchor="middle">${v}</text>`).join("") +
    yTicks.map((v) => `<text x="${left - 7}" y="${Y(v) + 4}" text-anchor="end">${v}</text>`).join("");
  svg.innerHTML = body(X, Y) + `<path class="axis" d="M${left} 16V${height - bottom}H${width - 20}"/>` + ticks +
    `<text x="${(left + width) / 2}" y="${height - 5}" text-anchor="middle">${escaped(xLabel)}</text>` +
    `<text x="0" y="11">${escaped(yLabel)}</text>`;
}

/** A widget: shows each control's value beside its label and draws again on every change. */
function widget(name, draw) {
  const place = $(`[data-widget="${name}"]`);
  if (!place) return;
  const controls = $$("input, select", place);
  const value = (control) => (control.type === "checkbox" ? control.checked : control.type === "range" ? Number(control.value) : control.value);
  const update = () => draw(place, Object.fromEntries(controls.map((control) => [control.name, value(control)])));
  controls.forEach((control) => control.addEventListener("input", update));
  listeners.push(update);
}

const show = (place, name, text) => { $(`[data-for="${name}"]`, place).textContent = text; };
const percent = (x, digits = 1) => (100 * x).toFixed(digits) + " %";

// --- rank -----------------------------------------------------------------------------------------------------------

widget("rank", (place, { what, r }) => {
  const it = data.matrices[what], pca = what === "pca", [rows, columns] = it.shape;
  const most = pca ? it.components.length : it.S.length, slider = $("[name=r]", place);
  if (Number(slider.max) !== most) { slider.max = most; r = Math.min(r, most); slider.value = r; }
  const put = (k) => pca
    ? it.mean.map((m, i) => it.components.slice(0, k).reduce((sum, row, j) => sum + it.scores[j] * row[i], m))
    : [...minipeft.bestRankR(it, k)];
  const whole = put(most), near = put(r), left = whole.map((x, i) => x - near[i]);
  const limit = Math.max(...whole.map(Math.abs)), grey = pca || what === "digit";
  const [a, b, c] = $$("canvas", place);
  picture(a, whole, it.shape, limit, grey);
  picture(b, near, it.shape, limit, grey);
  picture(c, left, it.shape, limit, false);
  const length = (list) => Math.sqrt(list.reduce((sum, x) => sum + x * x, 0));
  const kept = pca ? 1 - (length(left) / length(it.scores)) ** 2 : minipeft.energy(it.S, r);
  const numbers = r * (rows + columns);
  show(place, "r", r);
  $(".result", place).textContent = pca
    ? say(`${r} of 64 components hold ${percent(kept)} of this digit's distance from the mean digit.`, `64 个主成分中的前 ${r} 个，保留了该数字相对平均数字的 ${percent(kept)}。`)
    : say(`Rank ${r} holds ${percent(kept)} of ‖W‖², relative error ${percent(Math.sqrt(Math.max(0, 1 - kept)))}; ${numbers} numbers instead of ${rows * columns}.`,
      `秩 ${r} 保留 ‖W‖² 的 ${percent(kept)}，相对误差 ${percent(Math.sqrt(Math.max(0, 1 - kept)))}；用 ${numbers} 个数代替 ${rows * columns} 个。`);
  b.setAttribute("aria-label", say(`approximation of rank ${r}`, `秩 ${r} 的近似`));
});

// --- bits and blocks ------------------------------------------------------------------------------------------------

const sample = minipeft.normalSample(16384);
widget("quantize", (place, { code, bits, block }) => {
  const size = 2 ** block, fp = code === "fp", table = minipeft.codeTable(code + (fp ? 4 : bits));
  $("[name=bits]", place).disabled = fp;
  const back = minipeft.quantize(sample, table, size);
  let error = 0, energy = 0;
  sample.forEach((x, i) => { error += (x - back[i]) ** 2; energy += x * x; });
  const width = fp ? 4 : bits;
  show(place, "bits", width);
  show(place, "block", size);
  // The first block, as it is coded: how its numbers lie, and the levels they are rounded to.
  const first = sample.slice(0, size), absmax = Math.max(...first.map(Math.abs)), bins = 61;
  const counts = new Array(bins).fill(0);
  sample.forEach((x) => { if (Math.abs(x) <= absmax) counts[Math.min(bins - 1, Math.floor(((x / absmax + 1) / 2) * bins))]++; });
  const top = Math.max(...counts);
  frame($(".plot", place), {
    x: [-absmax, absmax], y: [0, 1.05], xTicks: [-absmax, 0, absmax].map((v) => +v.toFixed(2)), yTicks: [],
    xLabel: say("weights of a block; lines: the code's numbers", "一块中的权重；竖线：编码的取值"), yLabel: "",
    body: (X, Y) => counts.map((n, i) => `<rect class="area" x="${X(((2 * i) / bins - 1) * absmax)}" y="${Y(n / top)}" width="${X(2 * absmax / bins) - X(0)}" height="${Y(0) - Y(n / top)}"/>`).join("") +
      table.map((level) => `<path class="level" d="M${X(level * absmax)} ${Y(0)}V${Y(width > 5 ? 0.14 : 0.3)}"/>`).join(""),
  });
  $(".result", place).textContent = say(
    `${(width + 32 / size).toFixed(3)} bits a weight (codes and a float32 maximum for each block); squared error ${percent(error / energy, 3)} of ‖W‖².`,
    `每个权重 ${(width + 32 / size).toFixed(3)} 比特（编码加每块一个 float32 最大值）；平方误差为 ‖W‖² 的 ${percent(error / energy, 3)}。`);
});

// --- budget ---------------------------------------------------------------------------------------------------------

widget("budget", (place, { total, tinit, tfinal, init, target, modules }) => {
  const warm = Math.round((total * tinit) / 100), settle = Math.round((total * tfinal) / 100);
  const end = Math.min(target, init);
  const schedule = { total_step: total, tinit: warm, tfinal: settle, init_budget: init * modules, target_budget: end * modules };
  const steps = Array.from({ length: 201 }, (_, i) => Math.round(1 + (i * (total - 1)) / 200));
  const budget = steps.map((step) => minipeft.rankBudget(step, schedule));
  show(place, "total", total);
  show(place, "tinit", warm);
  show(place, "tfinal", settle);
  show(place, "init", init);
  show(place, "target", end);
  show(place, "modules", modules);
  const most = init * modules;
  frame($(".plot", place), {
    x: [0, total], y: [0, most * 1.05], xTicks: [0, total / 4, total / 2, (3 * total) / 4, total].map(Math.round), yTicks: [0, Math.round(most / 2), most],
    xLabel: say("step", "步"), yLabel: say("directions in all modules together, b(t)", "所有模块的方向总数 b(t)"),
    body: (X, Y) => `<path class="line" d="${steps.map((step, i) => `${i ? "L" : "M"}${X(step).toFixed(1)} ${Y(budget[i]).toFixed(1)}`).join("")}"/>`,
  });
  const half = Math.round(total / 2);
  $(".result", place).textContent = say(
    `Half-way, at step ${half}: ${minipeft.rankBudget(half, schedule)} directions, ${(minipeft.rankBudget(half, schedule) / modules).toFixed(1)} a module on average; at the end ${end}.`,
    `过半时（第 ${half} 步）共 ${minipeft.rankBudget(half, schedule)} 个方向，平均每个模块 ${(minipeft.rankBudget(half, schedule) / modules).toFixed(1)} 个；结束时 ${end} 个。`);
});

// --- memory ---------------------------------------------------------------------------------------------------------

const gigabytes = (bytes) => (bytes >= 1e9 ? (bytes / 1e9).toFixed(bytes >= 1e11 ? 0 : 2) + " GB" : (bytes / 1e6).toFixed(1) + " MB");
widget("memory", (place, { size, method, dtype, optimizer, r, batch, seq, checkpointing }) => {
  const options = { r, batch, seq: 2 ** seq, dtype_bytes: Number(dtype), optimizer, checkpointing };
  const parts = minipeft.estimateMemory(Number(size), method, options);
  $("[name=r]", place).disabled = method === "full";
  show(place, "r", method === "full" ? "–" : r);
  show(place, "batch", batch);
  show(place, "seq", 2 ** seq);
  const total = Object.values(parts).reduce((a, b) => a + b, 0), most = Math.max(...Object.values(parts));
  const names = { weights: say("weights", "权重"), gradients: say("gradients", "梯度"), optimizer: say("optimizer state", "优化器状态"), activations: say("activations", "激活值") };
  const rows = Object.entries(parts).map(([part, bytes]) =>
    `<tr><th scope="row">${names[part]}</th><td>${gigabytes(bytes)}</td><td class="meter"><i style="width:${((100 * bytes) / most).toFixed(2)}%"></i></td></tr>`);
  $("table", place).innerHTML = `<tbody>${rows.join("")}<tr><th scope="row">${say("together", "合计")}</th><td>${gigabytes(total)}</td><td></td></tr></tbody>`;
  const fits = [6, 8, 12, 16, 24, 40, 80].find((card) => total <= card * 2 ** 30);
  const shape = minipeft.llamaShape(Number(size)), count = (minipeft.parameters(shape) / 1e9).toFixed(2);
  $(".result", place).textContent = say(
    `${count} billion weights. ${fits ? `The sum fits into ${fits} GiB` : "The sum is more than 80 GiB"}; a runtime's own buffers and fragmentation come on top.`,
    `${count}×10⁹ 个权重。${fits ? `合计可放入 ${fits} GiB 显存` : "合计超过 80 GiB"}；运行时缓冲区与碎片另计。`);
});

let resized = 0;
addEventListener("resize", () => {
  cancelAnimationFrame(resized);
  resized = requestAnimationFrame(() => listeners.forEach((draw) => draw()));
});

// --- start ----------------------------------------------------------------------------------------------------------

const asked = location.hash === "#zh" || location.hash === "#en" ? location.hash.slice(1) : null;
const theme = kept.get("theme");
if (theme === "dark" || theme === "light") root.dataset.theme = theme;
setLanguage(asked || kept.get("lang") || ((navigator.language || "en").startsWith("zh") ? "zh" : "en"));
