/* What the page's scripts share. Text enters only by textContent. */
"use strict";
const make = (name, className, text) => {
  const node = document.createElement(name);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
};
const number = (value) => value.toFixed(2).replace("-", "−");
