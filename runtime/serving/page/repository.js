/* The view of all checkpoints: find, read, make a contact sheet, draw with one. */

import { get, post, source } from "./api.js";
import { button, byId, make } from "./elements.js";

const KINDS = { dreambooth: "DreamBooth", lora: "LoRA", textual_inversion: "Textual Inversion", custom_diffusion: "Custom Diffusion" };
const SHOWN = 120;

export function startRepository(use) {
  const state = { rows: [], sheets: new Map(), use };
  byId("find").addEventListener("input", () => list(state));
  return { enter: () => load(state) };
}

async function load(state) {
  try {
    state.rows = (await get("/v1/models")).data;
    list(state);
  } catch (error) {
    byId("count").textContent = error.message;
  }
}

function list(state) {
  const words = byId("find").value.toLowerCase().split(/\s+/).filter(Boolean);
  const text = ({ id, personalq: told }) => [id, told.name, told.class_noun, told.kind, told.description, ...told.tags].join(" ").toLowerCase();
  const found = state.rows.filter((row) => words.every((word) => text(row).includes(word)));
  const more = found.length > SHOWN ? `, the first ${SHOWN} shown` : "";
  byId("count").textContent = `${found.length} of ${state.rows.length} checkpoints${more}`;
  byId("cards").replaceChildren(...found.slice(0, SHOWN).map((row) => card(state, row)));
}

function card(state, row) {
  const told = row.personalq;
  const kind = make("p", `${KINDS[told.kind] ?? told.kind} on ${told.base || "an unknown base"} `, { class: "kind" });
  kind.append(...told.trigger.slice(0, 2).map((trigger) => make("code", trigger)));
  const draw = button("Draw with it", () => state.use(row));
  draw.setAttribute("aria-label", `Draw with ${told.name || row.id}`);
  draw.disabled = !told.is_drawable;
  const parts = [make("h2", told.name || row.id), kind, make("p", told.description), draw];
  return make("li", "", { "data-id": row.id }, sheet(state, row), make("div", "", { class: "body" }, ...parts));
}

function sheet(state, row) {
  const place = make("div", "", { class: "sheet" });
  if (row.personalq.has_sheet) {
    place.classList.add("is-one");
    place.append(make("img", "", { src: `/v1/models/${row.id}/sheet`, alt: `Examples of ${row.id}`, loading: "lazy" }));
  } else if (state.sheets.has(row.id)) {
    fill(place, row, state.sheets.get(row.id));
  } else if (row.personalq.is_drawable) {
    const start = button("Contact sheet", () => drawSheet(state, row, place));
    start.setAttribute("aria-label", `Contact sheet of ${row.personalq.name || row.id}`);
    place.append(start);
  } else {
    place.append(make("p", "no bundle yet: personalq export"));
  }
  return place;
}

async function drawSheet(state, row, place) {
  place.replaceChildren(make("p", "drawing four ...", { role: "status" }));
  const prompt = row.personalq.example_prompts[0] ?? row.personalq.trigger[0] ?? row.personalq.class_noun;
  try {
    const asked = { prompt, model: row.id, n: 4, seed: 1, response_format: "b64_json" };
    const answer = await post("/v1/images/generations", asked);
    state.sheets.set(row.id, answer.data.map(source));
    fill(place, row, state.sheets.get(row.id));
  } catch (error) {
    place.replaceChildren(make("p", error.message, { role: "alert" }));
  }
}

function fill(place, row, pictures) {
  place.classList.add("is-four");
  place.replaceChildren(...pictures.map((src, i) => make("img", "", { src, alt: `${row.id}, seed ${i + 1}` })));
}
