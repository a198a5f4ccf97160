/* The page: shows one view at a time and starts each of them. */

import { storedKey, storeKey } from "./api.js";
import { startDraw } from "./draw.js";
import { startEngines } from "./engines.js";
import { startRepository } from "./repository.js";

const draw = startDraw();
const views = { draw, repository: startRepository(draw.use), engines: startEngines() };

function show() {
  const wanted = location.hash.slice(1);
  const name = wanted in views ? wanted : "draw";
  for (const [other, view] of Object.entries(views)) {
    document.getElementById(`view-${other}`).hidden = other !== name;
    if (other !== name) view.leave?.();
  }
  for (const link of document.querySelectorAll("nav [data-view]")) {
    if (link.dataset.view === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = name === "draw" ? "PersonalQ" : `${name[0].toUpperCase()}${name.slice(1)} - PersonalQ`;
  views[name].enter?.();
  document.querySelector(`#view-${name} h1`).focus({ preventScroll: true });
}

const key = document.getElementById("key");
key.value = storedKey();
key.addEventListener("change", () => {
  storeKey(key.value);
  show();
});
addEventListener("hashchange", show);
show();
