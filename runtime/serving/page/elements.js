/* Small ways to make and find elements. Text is always text: nothing of a card or an answer becomes markup. */

export const byId = (id) => document.getElementById(id);

export function make(tag, text = "", attributes = {}, ...children) {
  const element = document.createElement(tag);
  if (text) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

export function button(text, act, ...children) {
  const element = make("button", text, { type: "button" }, ...children);
  element.addEventListener("click", act);
  return element;
}

export const megabytes = (bytes) => `${(bytes / 1e6).toFixed(bytes < 1e8 ? 1 : 0)} MB`;
