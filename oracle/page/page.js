"use strict";
// The map: a click (or Enter) shows a stage's figures, arrow keys walk, and the address keeps the stage.
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const panel = document.getElementById("details");
  const hover = document.getElementById("hover");
  const buttons = [...document.querySelectorAll(".map button")];

  function show(button) {
    for (const other of buttons) {
      const mine = other === button;
      other.setAttribute("aria-pressed", String(mine));
      other.tabIndex = mine ? 0 : -1;
    }
    const key = button.dataset.key;
    panel.querySelector("h2").textContent = key;
    const lines = Object.entries(figures[key]).flatMap(([name, words]) => [line("dt", name), line("dd", words)]);
    panel.querySelector("dl").replaceChildren(...lines);
    history.replaceState(null, "", "#" + key);
  }

  function line(tag, words) {
    const element = document.createElement(tag);
    element.textContent = words;
    return element;
  }

  // The next cell in a direction; places where a layer has no such stage are passed over.
  function next(button, across, down) {
    const cell = button.parentElement;
    const rows = [...cell.closest("tbody").rows];
    let [row, column] = [rows.indexOf(cell.parentElement) + down, cell.cellIndex + across];
    while (rows[row]?.cells[column]) {
      const found = rows[row].cells[column].querySelector("button");
      if (found) return found;
      [row, column] = [row + down, column + across];
    }
    return null;
  }

  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  for (const button of buttons) {
    const say = () => { hover.textContent = button.title; };
    button.addEventListener("click", () => show(button));
    button.addEventListener("mouseover", say);
    button.addEventListener("focus", say);
    button.addEventListener("keydown", (event) => {
      const found = steps[event.key] && next(button, ...steps[event.key]);
      if (!found) return;
      event.preventDefault();
      button.tabIndex = -1;
      found.tabIndex = 0;
      found.focus();
    });
  }

  const start = buttons.find((button) => "#" + button.dataset.key === location.hash);
  if (start) show(start);
  const shown = start ?? buttons.find((button) => button.getAttribute("aria-pressed") === "true");
  const box = shown?.closest(".scroll");
  if (box) box.scrollLeft = shown.offsetLeft - box.clientWidth / 2;

  const copy = document.getElementById("copy");
  copy.addEventListener("click", async () => {
    const text = document.getElementById("sentence");
    try {
      await navigator.clipboard.writeText(text.textContent);
      copy.textContent = "copied";
    } catch {
      getSelection().selectAllChildren(text);
      copy.textContent = "selected: copy it now";
    }
  });
})();
