/* What the page's scripts share. Text enters only by textContent. */
"use strict";
const make = (name, className, text) => {
  const node = document.createElement(name);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
};
const small = (value) => Math.abs(value) < 0.005 && Math.abs(value) >= 1e-9; // two decimals would say nothing of it
const number = (value) => (small(value) ? value.toPrecision(1) : value.toFixed(2).replace("-0.00", "0.00")).replace("-", "−");
