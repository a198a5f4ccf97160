/* The view of what is in memory. Asks again every two seconds while it is shown. */

import { get } from "./api.js";
import { byId, make, megabytes } from "./elements.js";

export function startEngines() {
  let timer = 0;
  const again = async () => {
    await refresh();
    timer = timer && setTimeout(again, 2000);
  };
  const leave = () => {
    clearTimeout(timer);
    timer = 0;
  };
  return { leave, enter: () => { leave(); timer = -1; again(); } };
}

async function refresh() {
  try {
    show(await get("/v1/residency"));
  } catch (error) {
    byId("memory-text").textContent = error.message;
  }
}

function show(told) {
  if (!told.engines) return;
  byId("memory-text").textContent = `${megabytes(told.used_bytes)} of ${megabytes(told.budget_bytes)} in ${told.engines.length} engines`;
  byId("memory").replaceChildren(...told.engines.map((engine) => {
    const bar = make("i", "", { title: `${engine.checkpoint}: ${megabytes(engine.bytes)}` });
    bar.style.width = `${(100 * engine.bytes) / told.budget_bytes}%`;
    bar.classList.toggle("is-used", engine.in_use);
    return bar;
  }));
  const { hits, misses, evictions, prefetched } = told.counts;
  const rate = hits + misses ? `${Math.round((100 * hits) / (hits + misses))} %` : "-";
  const numbers = [["Hit rate", rate], ["Loaded ahead", prefetched], ["Evicted", evictions], ["Waiting or drawing", told.queue], ["Restarts", told.restarts]];
  byId("numbers").replaceChildren(...numbers.map(([name, value]) => make("div", "", {}, make("dt", name), make("dd", String(value)))));
  byId("resident").replaceChildren(...told.engines.map((engine) => {
    const cells = [engine.checkpoint, engine.policy, engine.engine, megabytes(engine.bytes), `${engine.load_seconds.toFixed(2)} s`, engine.uses, engine.in_use ? "in use" : "idle"];
    return make("tr", "", {}, ...cells.map((cell) => make("td", String(cell))));
  }));
}
