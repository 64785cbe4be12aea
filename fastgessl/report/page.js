"use strict";
const points = JSON.parse(document.getElementById("points").textContent);
const tip = document.getElementById("tip");
const [picture, label, file] = tip.children;

function nearest(map, event) {
  const box = map.getBoundingClientRect(), scale = map.viewBox.baseVal.width / box.width;
  const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
  let best = null, least = 20 * 20;
  for (const dot of map.children) {
    const across = dot.cx.baseVal.value - x, down = dot.cy.baseVal.value - y, distance = across * across + down * down;
    if (distance < least) { least = distance; best = dot; }
  }
  return best;
}

function hide() {
  tip.style.display = "none";
  for (const dot of document.querySelectorAll(".map .on")) dot.classList.remove("on");
}

function show(map, event) {
  hide();
  const dot = nearest(map, event);
  if (!dot) return;
  const point = points[Number(dot.dataset.n)];
  for (const same of document.querySelectorAll(`.map [data-n="${dot.dataset.n}"]`)) same.classList.add("on");
  picture.style.backgroundPosition = point.place;
  label.textContent = point.label;
  file.textContent = point.name;
  tip.style.display = "block";
  const left = Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8);
  const below = event.clientY + 14 + tip.offsetHeight < window.innerHeight;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${below ? event.clientY + 14 : Math.max(8, event.clientY - tip.offsetHeight - 14)}px`;
}

for (const map of document.querySelectorAll(".map")) {
  map.addEventListener("pointermove", event => show(map, event));
  map.addEventListener("pointerdown", event => show(map, event));
  map.addEventListener("pointerleave", hide);
}
window.addEventListener("scroll", hide, { passive: true });
document.documentElement.dataset.ready = `${points.length}`;
