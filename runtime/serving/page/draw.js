/* The view that draws: request, question, reasons, progress, picture, comparison. */

import { draw, get, source } from "./api.js";
import { button, byId, make, megabytes } from "./elements.js";

const PLACES = ["on the beach", "in the snow", "on a table"];

export function startDraw() {
  const state = { answers: [], last: null, abort: null, names: new Map() };
  byId("form").addEventListener("submit", (event) => {
    event.preventDefault();
    state.answers = [];
    run(state, body(state));
  });
  byId("cancel").addEventListener("click", () => state.abort?.abort());
  byId("again").addEventListener("click", () => run(state, { ...state.last.body, seed: undefined }));
  byId("compare").addEventListener("click", () => compare(state));
  byId("reveal").addEventListener("input", reveal);
  loadModels(state);
  return { use: (row) => use(state, row), enter: () => state.names.size || loadModels(state) };
}

async function loadModels(state) {
  const rows = await get("/v1/models").then((answer) => answer.data, (error) => (say(error.message, true), []));
  const drawable = rows.filter((row) => row.personalq.is_drawable);
  state.names = new Map(rows.map((row) => [row.id, row.personalq]));
  const options = drawable.map((row) => make("option", row.personalq.name || row.id, { value: row.id }));
  byId("model").replaceChildren(make("option", "let Check-in choose", { value: "auto" }), ...options);
  const things = drawable.filter(({ personalq: told }) => told.class_noun && told.class_noun !== "style" && told.description);
  byId("examples").replaceChildren(...PLACES.map((place, i) => [things[3 * i], place]).filter(([row]) => row).map(example));
}

function example([row, place]) {
  const words = row.personalq.description.split(/[.,;:(]| with | wearing | and /)[0].split(" ").slice(0, 8).join(" ");
  const text = `${words.charAt(0).toLowerCase()}${words.slice(1)} ${place}`;
  return button(text, () => {
    byId("request").value = text;
    byId("request").focus();
  });
}

function use(state, row) {
  byId("model").value = row.id;
  byId("request").value = row.personalq.example_prompts[0] ?? row.personalq.trigger[0] ?? "";
  location.hash = "#draw";
  byId("request").focus();
}

function body(state) {
  const number = (id) => (byId(id).value === "" ? undefined : Number(byId(id).value));
  return {
    prompt: byId("request").value,
    model: byId("model").value,
    steps: number("steps"),
    seed: number("seed"),
    sampler: byId("sampler").value || undefined,
    negative_prompt: byId("negative").value,
    answers: state.answers,
  };
}

async function run(state, asked) {
  state.abort?.abort();
  const abort = (state.abort = new AbortController());
  begin();
  try {
    for await (const event of draw(asked, abort.signal)) follow(state, asked, event);
  } catch (error) {
    if (abort !== state.abort) return;
    if (error.status === 409) ask(state, error.error);
    else if (error.name === "AbortError") say("Stopped.");
    else refuse(error);
  } finally {
    if (abort === state.abort) byId("progress-box").hidden = true;
  }
}

function begin() {
  for (const id of ["question", "why", "caption", "other", "reveal-box", "label-image", "label-other"]) byId(id).hidden = true;
  byId("image").style.clipPath = "";
  byId("progress-box").hidden = false;
  byId("progress").removeAttribute("value");
  byId("step").textContent = "";
  say("Asking Check-in ...");
}

function follow(state, asked, event) {
  if (event.type.endsWith("progress")) {
    explain(state, event);
    if (event.event === "queued") say(`Waiting for ${nameOf(state, event.checkpoint)} ...`);
    if (event.event === "step") {
      byId("progress").value = event.step / event.steps;
      byId("step").textContent = `${event.step} of ${event.steps}`;
      if (event.step === 1) say("Drawing ..."); // said once: a screen reader asks the progress bar for the rest
    }
  } else {
    show(event, `${event.type.endsWith("completed") ? "" : "Preview of "}${asked.prompt}`);
  }
  if (event.type.endsWith("completed")) finish(state, asked, event);
}

function show(event, text) {
  const image = byId("image");
  image.src = source(event);
  image.alt = text;
  image.hidden = false;
  byId("empty").hidden = true;
}

function finish(state, asked, event) {
  const told = event.personalq;
  state.last = { body: { ...asked, model: told.checkpoint, prompt: asked.prompt, answers: [] }, told };
  const facts = [
    ["Checkpoint", nameOf(state, told.checkpoint)],
    ["Bundle", `${told.policy}, ${megabytes(told.unet_bytes)}`],
    ["Engine", told.fallback_reason ? `${told.engine} (${told.fallback_reason})` : told.engine],
    ["Time", `${told.seconds.toFixed(2)} s for ${told.steps} steps`],
    ["Seed", String(told.seed)],
  ];
  byId("facts").replaceChildren(...facts.flatMap(([name, value]) => [make("dt", name), make("dd", value)]));
  byId("save").href = source(event);
  byId("compare").disabled = !state.names.get(told.checkpoint)?.has_reference;
  byId("compare").title = byId("compare").disabled ? "This checkpoint has no unquantised bundle" : "";
  byId("caption").hidden = false;
  say(["Done.", ...event.warnings].join(" "));
}

function ask(state, error) {
  byId("question-text").textContent = error.question;
  const choose = (option) => () => {
    state.answers = [...state.answers, option];
    run(state, body(state));
  };
  byId("options").replaceChildren(...error.options.map((option) => {
    const [name, ...rest] = option.split(": ");
    const parts = [make("b", name), make("span", rest.join(": "))];
    return make("li", "", {}, button("", choose(option), ...parts));
  }));
  byId("question").hidden = false;
  say("One question first.");
  byId("options").querySelector("button").focus();
}

function refuse(error) {
  say(error.message, true);
  if (error.error?.candidates?.length) candidates(null, error.error.candidates);
}

function explain(state, told) {
  if (!byId("why").hidden) return;
  const trigger = state.names.get(told.checkpoint)?.trigger.find((one) => told.prompt.includes(one));
  const [before, after] = trigger ? split(told.prompt, trigger) : [told.prompt, ""];
  byId("prompt").replaceChildren(before, ...(trigger ? [make("mark", trigger, { title: "trigger" })] : []), after);
  candidates(told.checkpoint, told.candidates ?? [{ id: told.checkpoint, probability: 1, reasons: ["named"] }]);
}

function split(text, part) {
  const at = text.indexOf(part);
  return [text.slice(0, at), text.slice(at + part.length)];
}

function candidates(chosen, rows) {
  byId("why-title").textContent = chosen ? "Why this checkpoint" : "The nearest checkpoints";
  byId("candidates").replaceChildren(...rows.slice(0, 3).map((row) => {
    const percent = `${Math.round(100 * row.probability)} %`;
    const reasons = row.reasons.slice(0, 4).map((reason) => make("li", reason));
    const meter = make("meter", percent, { min: 0, max: 1, value: row.probability, "aria-label": `${row.id} ${percent}` });
    const parts = [make("b", row.id), make("span", percent), meter, make("ul", "", { class: "chips" }, ...reasons)];
    return make("li", "", row.id === chosen ? { class: "is-chosen" } : {}, ...parts);
  }));
  byId("prompt").hidden = !chosen;
  byId("why").hidden = false;
}

async function compare(state) {
  const { body: asked, told } = state.last;
  byId("compare").disabled = true;
  say("Drawing the same picture without quantisation ...");
  try {
    for await (const event of draw({ ...asked, seed: told.seed, variant: "reference" })) {
      if (event.type.endsWith("completed")) beside(told, event);
    }
  } catch (error) {
    refuse(error);
  }
  byId("compare").disabled = false;
}

function beside(told, event) {
  const other = byId("other");
  other.src = source(event);
  other.alt = "The same picture, drawn by the unquantised bundle";
  byId("label-image").textContent = `${told.policy} ${megabytes(told.unet_bytes)}`;
  byId("label-other").textContent = `${event.personalq.policy} ${megabytes(event.personalq.unet_bytes)}`;
  for (const id of ["other", "reveal-box", "label-image", "label-other"]) byId(id).hidden = false;
  byId("reveal").value = 50;
  reveal();
  say("Left: quantised. Right: unquantised. Move the slider.");
  byId("reveal").focus();
}

function reveal() {
  byId("other").style.clipPath = `inset(0 0 0 ${byId("reveal").value}%)`;
}

const nameOf = (state, id) => state.names.get(id)?.name || id;

function say(text, isBad = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("is-bad", isBad);
}
